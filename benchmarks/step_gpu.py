"""The paper's optimisation step on a GPU against what users would set up there.

`python -m benchmarks.step` comes here where there is a GPU. Every engine takes one step from the
same path on the same batch, whose energy and gradient are compared with those of fp32 networks
evaluated one after the other; one that disagrees is called wrong and not timed. Then each is timed
by itself, in turns, since they do not fit into the memory side by side. Without CUDA what a graph
would replay is run operation by operation, so that all of this can be tried on a CPU.
"""

from __future__ import annotations

import copy
import gc
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastgeo import models, operations  # noqa: F401 - fills the table of operations
from fastgeo.data.inputs import Passes
from fastgeo.forward.options import Forward
from fastgeo.path import Path
from fastgeo.profiling.baselines import Baseline, compiled_loop, loop, vmapped
from fastgeo.profiling.measure import quantiles, time_alternating, wall_seconds
from fastgeo.stacking.precision import matmul_precision
from fastgeo.step.descent import Descent
from fastgeo.step.steps import Steps

LR = 0.1
# Allowed relative errors of the energy and of the gradient's norm, after one step.
ALLOWED = {"fp32": (1e-3, 1e-2), "tf32": (1e-2, 1e-1), "bf16": (5e-2, 3e-1)}
SECONDS = 15  # of measuring one engine in a round, as far as three steps allow
RELEASED = "loop, as released (fp32, torch's defaults)"
COMPILED = "loop, bf16, channels-last, compiled"
GRAPHED = "loop, bf16, channels-last, CUDA graph"
BOTH = "loop, bf16, channels-last, compiled, CUDA graph"
OURS = "fastgeo, bf16, CUDA graph"


@dataclass(frozen=True)
class Setting:
    """A ResNet of depth and width on images of pixels^2, N points, B images."""

    depth: int = 20
    width: float = 4
    pixels: int = 32
    points: int = 25
    batch: int = 256

    def make(self, device: str) -> tuple[nn.Module, Path, Tensor]:
        torch.manual_seed(0)
        module, a, b = (models.resnet(self.depth, self.width).to(device) for _ in range(3))
        x = torch.randn(self.batch, 3, self.pixels, self.pixels, device=device)
        return module, Path.linear(a, b, self.points), x

    def flop(self, module: nn.Module) -> float:
        """Of one step: forward and two products backward of the interior, forward of the ends."""
        macs = []

        def count(layer: nn.Module, _: object, out: Tensor) -> None:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                macs.append(out[0].numel() * layer.weight[0].numel())

        network = copy.deepcopy(module)
        for layer in network.modules():
            layer.register_forward_hook(count)
        device = next(network.parameters()).device
        with torch.no_grad():
            network(torch.zeros(1, 3, self.pixels, self.pixels, device=device))
        return 2 * sum(macs) * self.batch * (3 * (self.points - 2) + 2)


class Loops:
    """A baseline (`fastgeo.profiling.baselines`), run as it is or replayed from a CUDA graph."""

    def __init__(self, make: Callable[..., Baseline], module, path, x, *, graphed=False, **options):
        if options.get("channels_last"):
            x = x.contiguous(memory_format=torch.channels_last)
        self.baseline, self.x = make(module, path, lr=LR, **options), x
        self.step = self._captured() if graphed and x.is_cuda else self._run

    def interior(self) -> dict[str, Tensor]:
        points = self.baseline.points()[1:-1]
        return {name: torch.stack([point[name] for point in points]) for name in points[0]}

    def _run(self) -> None:
        self.energy = self.baseline.step(self.x)

    def _captured(self) -> Callable[[], None]:
        """The step as a CUDA graph; the weights are put back to where they were before it."""
        before = [{k: t.clone() for k, t in point.items()} for point in self.baseline.points()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # or what only cycles hold stays beside the graph's own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run()
        for point, state in zip(self.baseline.points(), before, strict=True):
            for name, tensor in state.items():
                point[name].copy_(tensor)
        return graph.replay


class Fastgeo:
    """Steps of `fastgeo.optimize` on one batch, or on several in turn, replayed or one by one."""

    def __init__(self, module, path, *x, graphed=False, precondition=False, **forward):
        descent = Descent(LR, 0.0, "constant", precondition, coarse_to_fine=False)
        self.steps = Steps(
            module,
            Passes(x, repeat=True),
            descent,
            Forward(engine="stacked", channels_last=True, **forward),
            capture=graphed,
            device=path.device,
            most=len(path) - 2,
            on_choice=None,
        )
        self.precision = self.steps.forward.precision
        self.steps.begin(path, {})
        with matmul_precision(self.precision):
            self.steps.take([0.0])  # in which every operation finds out which way it runs
        if slow := self.steps.choice.chosen.network.not_stacked():
            raise RuntimeError(f"not stacked: {slow}")
        self.energy = torch.zeros(())

    def step(self) -> None:
        with matmul_precision(self.precision):
            self.energy = self.steps.take([LR]).energies[0].sum()

    def descend(self, steps: int) -> Iterator[float]:
        """The energy before each of so many steps, which are read as many together as they are."""
        while steps:
            with matmul_precision(self.precision):
                taken = self.steps.take([LR] * min(steps, self.steps.at_once))
            if taken.why:
                raise ArithmeticError(taken.why)
            yield from taken.energies.sum(1).tolist()
            steps -= len(taken.energies)

    def interior(self) -> dict[str, Tensor]:
        return self.steps.step.copied_path().interior


@dataclass(frozen=True)
class Engine:
    """What is timed.

    Attributes:
        make: (module, path, x) -> something with step(), energy and interior().
        precision: of the comparison, and of the fp32 products of those who do not set it.
        steps: whether it does plain SGD steps, which can be compared.
    """

    make: Callable
    precision: str
    comparable: bool = True


def engines() -> dict[str, Engine]:
    def loops(make: Callable[..., Baseline], **options):
        return lambda *given: Loops(make, *given, **options)

    def ours(**options):
        return lambda *given: Fastgeo(*given, **options)

    half = dict(bfloat16=True, channels_last=True)
    best = dict(precision="bf16", graphed=True)
    return {
        RELEASED: Engine(loops(loop), "tf32"),
        "loop, bf16, channels-last": Engine(loops(loop, **half), "bf16"),
        "vmap": Engine(loops(vmapped), "tf32"),
        "vmap, bf16": Engine(loops(vmapped, bfloat16=True), "bf16"),
        "fastgeo, fp32": Engine(ours(), "fp32"),
        "fastgeo, bf16": Engine(ours(precision="bf16"), "bf16"),
        COMPILED: Engine(loops(compiled_loop, **half), "bf16"),
        GRAPHED: Engine(loops(loop, **half, graphed=True), "bf16"),
        BOTH: Engine(loops(compiled_loop, **half, graphed=True), "bf16"),
        "fastgeo, TF32, CUDA graph": Engine(ours(precision="tf32", graphed=True), "tf32"),
        OURS: Engine(ours(**best), "bf16"),
        "fastgeo, bf16, CUDA graph, 8 GB of activations": Engine(
            ours(**best, memory_budget="8GB"), "bf16"
        ),
        "fastgeo, bf16, CUDA graph, preconditioned": Engine(
            ours(**best, precondition=True), "bf16", comparable=False
        ),
    }


def chosen(*, gpu: bool, compiled: bool) -> list[str]:
    """Those that say something on such a device."""
    names = [name for name in engines() if gpu or "CUDA graph" not in name]
    return [name for name in names if compiled or "compiled" not in name]


def reference(module: nn.Module, path: Path, x: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Energy and interior after one plain step, in exact fp32, two networks alive at a time."""
    with matmul_precision("fp32"):
        exact = Fastgeo(module, path, x, chunk=1)
        exact.step()
    return exact.energy.item(), exact.interior()


@dataclass(frozen=True)
class Start:
    """Where every engine takes its step from, and the energy and interior after that step."""

    module: nn.Module
    path: Path
    x: Tensor
    expected: tuple[float, dict[str, Tensor]]

    @classmethod
    def of(cls, setting: Setting, device: str) -> Start:
        made = setting.make(device)
        return cls(*made, reference(*made))


def check(engine, start: dict, expected: tuple[float, dict]) -> tuple[float, float]:
    """Relative errors of the energy and of the gradient after one step."""
    engine.step()
    energy = abs(engine.energy.item() - expected[0]) / abs(expected[0])
    after, wanted = engine.interior(), expected[1]
    error = sum((after[k] - wanted[k]).double().square().sum().item() for k in wanted)
    moved = sum((wanted[k] - start[k]).double().square().sum().item() for k in wanted)
    return energy, (error / moved) ** 0.5


def flags(precision: str):
    """Torch's own defaults for what is as released; fastgeo sets its own."""
    if precision == "tf32":
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=True)
    return nullcontext()


@dataclass
class Measured:
    """What is known of an engine so far.

    Attributes:
        seconds: of each step.
        errors: of the energy and of the gradient; None where steps cannot be compared.
        peak: bytes beyond the weights and images; None where nothing tells.
        failed: why it has no time, in words.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    errors: tuple[float, float] | None = None
    peak: int | None = None
    failed: str = ""


def measure(
    start: Start,
    names: Collection[str],
    *,
    repeats: int,
    rounds: int = 2,
    seconds: float = SECONDS,
) -> Iterator[Measured]:
    """Each engine as soon as it is measured, in every round; the order is reversed in the second.

    Args:
        names: of `engines`.
        repeats: steps in a round, at most.
        seconds: of measuring one engine in a round, as far as three steps allow.
    """
    found = {name: Measured(name) for name in names}
    for turn in range(rounds):
        for name in list(found)[:: 1 if turn % 2 == 0 else -1]:
            if not found[name].failed:
                _measure_one(found[name], start, repeats, seconds)
                yield found[name]


def _measure_one(into: Measured, start: Start, repeats: int, seconds: float) -> None:
    entry, gpu = engines()[into.name], start.x.is_cuda
    gc.collect()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        with flags(entry.precision):
            engine = entry.make(start.module, start.path, start.x)
            errors = check(engine, start.path.interior, start.expected)
            if entry.comparable:
                into.errors = errors
                allowed = zip(errors, ALLOWED[entry.precision], strict=True)
                if not all(error <= most for error, most in allowed):
                    into.failed = "wrong"
                    return
            fits = int(seconds / max(wall_seconds(engine.step), 1e-4))
            times = time_alternating({"": engine.step}, max(3, min(repeats, fits)))
            into.seconds += times[""]
            if gpu:
                into.peak = torch.cuda.max_memory_allocated() - before
    except Exception as error:  # noqa: BLE001 - what does not run is a row
        traceback.print_exc()
        into.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"


def rows(measured: Iterable[Measured], flop: float, rate: float) -> list[dict[str, str]]:
    """A row for each engine.

    Args:
        flop: of a step.
        rate: of bf16 products, FLOP/s.
    """
    last = {one.name: one for one in measured}  # as of its last round
    released = last[RELEASED] if RELEASED in last and not last[RELEASED].failed else None
    return [_row(one, released, flop, rate) for one in last.values()]


def _row(one: Measured, released: Measured | None, flop: float, rate: float) -> dict[str, str]:
    row = {"implementation": one.name, "ms a step (p20/p50/p80)": one.failed}
    row |= dict.fromkeys(("times as released", "TFLOP/s", "of bf16 matmul", "peak GiB"), "-")
    if not one.failed:
        quantile = quantiles(one.seconds)
        row["ms a step (p20/p50/p80)"] = "/".join(f"{1e3 * q:.2f}" for q in quantile.values())
        if released is not None:
            times = quantiles(released.seconds)["p50"] / quantile["p50"]
            row["times as released"] = f"{times:.2f}"
        row["TFLOP/s"] = f"{flop / quantile['p50'] / 1e12:.3g}"
        row["of bf16 matmul"] = f"{flop / quantile['p50'] / rate:.1%}"
        if one.peak is not None:
            row["peak GiB"] = f"{one.peak / 2**30:.1f}"
    errors = one.errors and ", ".join(f"{error:.0e}" for error in one.errors)
    return row | {"error of energy, gradient": errors or "-"}
