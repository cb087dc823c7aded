"""How fast an optimisation step is, against what people set up instead."""

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from fastgeo.data.inputs import Inputs, each_tensor, first_few, tensors_of
from fastgeo.forward.options import Forward, way
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.profiling import baselines
from fastgeo.profiling.measure import (
    flops_of,
    matmul_rate,
    now,
    peak_bytes,
    quantiles,
)
from fastgeo.stacking.module import channels_last_is_unsafe
from fastgeo.stacking.precision import matmul_precision, multiplies_in_bf16
from fastgeo.step.descent import Descent

CHECKED = 32  # inputs on which every implementation is checked
TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 1e-1}  # of the largest entry of the gradient
LR = 0.1
PLAIN = Descent(LR, 0.0, "constant", precondition=False, coarse_to_fine=False)
LOOP = "loop over modules"


@dataclass(frozen=True)
class Implementation:
    """A way to optimise a path by plain SGD.

    Attributes:
        step: (path, inputs) -> the energy and the points after one step.
        seconds: (steps) -> seconds a step, on the batch that is measured.
        dtype: of its convolutions and matrix products.
    """

    step: Callable[[Path, Inputs], tuple[float, list[dict[str, Tensor]]]]
    seconds: Callable[[int], float]
    dtype: torch.dtype = torch.float32


def compare(
    module: nn.Module,
    path: Path,
    inputs: Inputs,
    *,
    repeats: int = 10,
    steps: int = 3,
    compiled: bool = True,
    improved: bool = True,
    forward: Forward | None = None,
) -> list[dict[str, Any]]:
    """A row for each implementation of the optimisation step, on one batch.

    Every implementation is first checked on a few inputs: its energy and gradient against the loop
    in float64, without TF32. One that is off by more than 1 % of the largest entry (10 % in bf16)
    is called wrong, and has no times.

    Args:
        module: the network of all points, in eval mode.
        path: where the step starts.
        inputs: a batch [B, ...] on the path's device.
        repeats: measurements of each implementation, which take turns.
        steps: steps in one measurement.
        compiled: also the loop over compiled modules.
        improved: also the loop in channels-last and under vmap, and in bf16 what fastgeo chooses
            where the processor multiplies in it, and on GPUs the loop.
        forward: how fastgeo evaluates networks; by default what engine="auto" chooses.

    Returns:
        "implementation"; "ms a step" and "times the loop" as {"p20", "p50", "p80"};
        "images·points/s"; "TFLOP/s", counting convolutions and matrix products that a step needs;
        "of matmul", its share of a large matrix product's rate in the same run (fp32 on CPUs, bf16
        on GPUs); "peak MiB" beyond the weights; "error" of the gradient.
    """
    forward = chosen_forward(module, path, inputs) if forward is None else forward
    implementations = _implementations(
        module, path, inputs, compiled=compiled, improved=improved, forward=forward
    )
    with matmul_precision("fp32"):  # a GPU's default for convolutions is TF32
        errors = {name: _error(i, module, path, inputs) for name, i in implementations.items()}
    sound = {n: i for n, i in implementations.items() if errors[n] < TOLERANCE[i.dtype]}
    seconds = _in_turns(sound, steps, repeats)
    peaks = {n: peak_bytes(functools.partial(i.seconds, 1)) for n, i in sound.items()}
    flops, fastest = step_flops(module, path, inputs), fastest_matmul(path.device)
    rows = []
    for name in implementations:
        row: dict[str, Any] = {"implementation": name}
        if name in sound:
            times = quantiles(seconds[name])
            rate = flops / times["p50"]
            row |= {
                "ms a step": {level: 1e3 * s for level, s in times.items()},
                "images·points/s": round(_rows(inputs) * len(path) / times["p50"]),
                "TFLOP/s": rate / 1e12,
                "of matmul": f"{rate / fastest:.0%}",
                "peak MiB": round(peaks[name] / 2**20),
                "times the loop": _ratios(seconds, name),
            }
        else:
            columns = ("ms a step", "images·points/s", "TFLOP/s", "of matmul", "peak MiB")
            row |= dict.fromkeys((*columns, "times the loop"), "wrong")
        rows.append(row | {"error": f"{errors[name]:.0e}"})
    return rows


def _in_turns(
    implementations: dict[str, Implementation], steps: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds a step of each, `repeats` times; the order is reversed in every second round."""
    found: dict[str, list[float]] = {name: [] for name in implementations}
    for turn in range(repeats):
        for name in list(implementations)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(implementations[name].seconds(steps))
    return found


def chosen_forward(
    module: nn.Module, path: Path, inputs: Inputs, forward: Forward = Forward()
) -> Forward:
    """What `optimize` chooses for a step, so that it names its engine."""
    choices: list[dict] = []
    optimize(
        *(path, module, repeat(inputs)),
        steps=20,
        descent=PLAIN,
        forward=forward,
        cuda_graph=False,
        on_choice=choices.append,
    )
    chosen = {name: choices[0][name] for name in ("engine", "channels_last", "chunk", "precision")}
    return replace(forward, **chosen, memory_budget=None)


def step_flops(module: nn.Module, path: Path, inputs: Inputs) -> float:
    """FLOP of the convolutions and matrix products that a step needs: the ends' only forward."""
    few = _few(inputs)
    counted = flops_of(lambda: baselines.loop(module, path, lr=LR).step(few))
    return counted * _rows(inputs) / _rows(few)


def fastest_matmul(device: torch.device) -> float:
    """FLOP a second of a large matrix product: fp32 on CPUs, bf16 on GPUs."""
    return matmul_rate(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def described(forward: Forward) -> str:
    """The engine in words."""
    return way(forward.engine, forward.channels_last, forward.chunk, forward.precision)


def _implementations(
    module: nn.Module,
    path: Path,
    inputs: Inputs,
    *,
    compiled: bool,
    improved: bool,
    forward: Forward,
) -> dict[str, Implementation]:
    make: dict[str, Callable[..., baselines.Baseline]] = {LOOP: baselines.loop}
    if improved and (path.device.type == "cuda" or not channels_last_is_unsafe(module)):
        make["loop, channels-last"] = functools.partial(baselines.loop, channels_last=True)
    if improved:
        make["torch.func.vmap"] = baselines.vmapped
    if compiled:
        make["loop, compiled"] = baselines.compiled_loop
    bfloat16: dict[str, Callable[..., baselines.Baseline]] = {}
    if improved and path.device.type == "cuda":
        options: dict[str, Any] = dict(channels_last=True, bfloat16=True)
        bfloat16["loop, channels-last, bf16"] = functools.partial(baselines.loop, **options)
        bfloat16["torch.func.vmap, bf16"] = functools.partial(baselines.vmapped, bfloat16=True)
        if compiled:
            name = "loop, compiled, channels-last, bf16"
            bfloat16[name] = functools.partial(baselines.compiled_loop, **options)
    found = {
        name: Implementation(
            functools.partial(_one_step, baseline, module),
            _seconds(baseline, module, path, inputs),
            torch.bfloat16 if name in bfloat16 else torch.float32,
        )
        for name, baseline in (make | bfloat16).items()
    }
    stacked = Forward(engine="stacked")
    ways = [stacked, forward] if improved else [forward]
    if improved and multiplies_in_bf16(path.device):
        ways.append(chosen_forward(module, path, inputs, Forward(precision="bf16")))
    for how in ways:
        found[f"fastgeo, {described(how)}"] = _fastgeo(module, path, inputs, how)
    return found


def _one_step(make: Callable, module: nn.Module, path: Path, inputs: Inputs) -> tuple:
    baseline = make(module, path, lr=LR)
    return baseline.step(inputs).item(), baseline.points()


def _seconds(make: Callable, module: nn.Module, path: Path, inputs: Inputs) -> Callable:
    """Goes on with the same networks from call to call, which is made at the first one."""
    made: list[baselines.Baseline] = []

    def seconds(steps: int) -> float:
        if not made:
            made.append(make(module, path, lr=LR))
            made[0].step(inputs)
        started = now()
        for _ in range(steps):
            made[0].step(inputs)
        return (now() - started) / steps

    return seconds


def _fastgeo(module: nn.Module, path: Path, inputs: Inputs, forward: Forward) -> Implementation:
    how: dict[str, Any] = dict(descent=PLAIN, forward=forward, cuda_graph=False)

    def step(path: Path, inputs: Inputs) -> tuple[float, list[dict[str, Tensor]]]:
        energy = []
        on_step = lambda metrics, _: energy.append(metrics["energy"])  # noqa: E731
        after = optimize(path, module, [inputs], steps=1, on_step=on_step, **how)
        return energy[0], list(after.points())

    def seconds(steps: int) -> float:
        times: list[float] = []

        def stamped() -> Iterator[Inputs]:
            while True:
                times.append(now())
                yield inputs

        optimize(path, module, stamped(), steps=steps + 2, **how)
        # From one batch to the next there is a step; the first of them is to warm up.
        return (times[-1] - times[1]) / steps

    dtype = torch.bfloat16 if forward.precision == "bf16" else torch.float32
    return Implementation(step, seconds, dtype)


def _error(implementation: Implementation, module: nn.Module, path: Path, inputs: Inputs) -> float:
    """Of the energy and the gradient on a few inputs, relative to the largest entry."""
    few = _few(inputs)
    energy, points = implementation.step(path, few)
    exact_energy, exact = _exact_step(module, path, few)
    largest = off = 0.0
    for before, one, other in zip(path.points(), points, exact, strict=True):
        for name in one.keys() & other.keys():
            if other[name].is_floating_point():
                moved = other[name] - before[name].double()
                largest = max(largest, moved.abs().max().item())
                off = max(off, (one[name].double() - other[name]).abs().max().item())
    return max(abs(energy / exact_energy - 1), off / largest)


def _exact_step(module: nn.Module, path: Path, inputs: Inputs) -> tuple:
    """The loop in float64."""
    parts = ({k: _double(v) for k, v in p.items()} for p in (path.start, path.interior, path.end))
    module = copy.deepcopy(module).double()
    return _one_step(baselines.loop, module, Path(*parts), each_tensor(_double, inputs))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _few(inputs: Inputs) -> Inputs:
    return first_few(inputs, CHECKED)[0]


def _rows(inputs: Inputs) -> int:
    """B."""
    return len(tensors_of(inputs)[0])


def _ratios(seconds: dict[str, list[float]], name: str) -> dict[str, float] | str:
    """Of the loop's time to another's in the same round; "-" if the loop itself is wrong."""
    if LOOP not in seconds:
        return "-"
    return quantiles(n / s for n, s in zip(seconds[LOOP], seconds[name], strict=True))
