"""The optimisation of a path on static buffers: a step that a CUDA graph can hold.

Weights of all interior points lie in one tensor [N - 2, P], and gradients in another; what makes
the inputs of many steps waits on the device, and so do the energies until they are read. A step is
then a fixed sequence of operations on fixed memory that the host does not look at: augmentation,
forward pass, divergence, backward pass, update. On a GPU it is captured once and replayed;
elsewhere the same object runs it operation by operation.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from fastgeo_kernels import path_update
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgeo.data import Dataset
from fastgeo.descent import Descent
from fastgeo.energy import energy_and_gradient, logits_of
from fastgeo.engines import Engine, EngineChoice
from fastgeo.inputs import Inputs, Passes
from fastgeo.modes import evaluation_mode
from fastgeo.optimize import trained_names
from fastgeo.path import Path, check_path_of
from fastgeo.precision import matmul_precision

WARM_UP = 3  # steps before a capture, in which libraries choose and compile what they run


class Augmented:
    """Random training batches of a data set, which are cut out and augmented on its device.

    The same batches as `dataset.shuffled(batch_size, generator)`; the host only draws numbers.
    """

    def __init__(self, dataset: Dataset, batch_size: int, generator: torch.Generator):
        self.dataset = dataset
        self.draws = dataset.draws(batch_size, generator)

    def take(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """What to keep on the device for each of the following steps; may end early."""
        return islice(self.draws, count)

    def inputs(self, kept: tuple[Tensor, ...]) -> Inputs:
        """A step's inputs, from what was kept for it."""
        return self.dataset.batch(*kept)


class Given:
    """Batches of equal shapes as they come, and again from the first one when they end."""

    def __init__(self, batches: Iterable):
        self.batches = Passes(batches, repeat=True)

    def take(self, count: int) -> Iterator[Inputs]:
        return islice(self.batches, count)

    def inputs(self, kept: Inputs) -> Inputs:
        return kept


class StaticStep:
    """A step of `fastgeo.optimize` that always works on the same memory.

    Attributes:
        weight: [N - 2, P], the trained parameters of the interior points side by side.
        energies: [K, E] nats, of the steps since the inputs were filled.
        filled: steps for which the constructor put inputs on the device.
        captured: the CUDA graph, if there is one.
    """

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        source: Augmented | Given,
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        lr_schedule: str = "constant",
        steps: int | None = None,
        precondition: bool = True,
        precision: str = "fp32",
        channels_last: bool | None = None,
        chunk: int | None = None,
        memory_budget: int | str | None = None,
        read_every: int = 50,
    ):
        """Arguments as of `optimize_static`."""
        check_path_of(path, module)
        self.module, self.source, self.read_every = module, source, read_every
        self.precision = precision
        self.trained = trained_names(module)
        self.descent = Descent(
            self.trained,
            lr=lr,
            momentum=momentum,
            lr_schedule=lr_schedule,
            precondition=precondition,
            steps=steps,
        )
        self.start, self.end, self.fixed = path.start, path.end, dict(path.interior)
        firsts = list(dict.fromkeys(self.trained.values()))
        dtypes = {path.interior[name].dtype for name in firsts}
        if len(dtypes) > 1:
            raise ValueError(
                f"the trained parameters must have one dtype, got {sorted(map(str, dtypes))}"
            )
        (dtype,), device, points = dtypes, path.device, len(path) - 2
        if channels_last is None:
            channels_last = device.type == "cuda"
        choice = EngineChoice(
            module,
            engine="stacked",
            channels_last=channels_last,
            chunk=chunk,
            memory_budget=memory_budget,
            precision=precision,
        )
        shapes = {name: path.interior[name].shape for name in firsts}
        size = sum(shape[1:].numel() for shape in shapes.values())
        self.weight = torch.empty(points, size, dtype=dtype, device=device)
        self.gradient = torch.zeros_like(self.weight)
        self.velocity = torch.zeros_like(self.weight) if momentum else None
        self.copy = self.weight.bfloat16() if precision == "bf16" else None
        self.views, self.gradients = (
            _views(flat, shapes, channels_last) for flat in (self.weight, self.gradient)
        )
        for name, view in self.views.items():
            view.copy_(path.interior[name])
        precise = torch.promote_types(dtype, torch.float32)
        self.rates = torch.zeros(read_every, dtype=precise, device=device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        self.energies = torch.zeros(read_every, points + 1, dtype=precise, device=device)
        self.kept = None  # [K, ...] of every tensor that the source gives
        self.captured: torch.cuda.CUDAGraph | None = None
        self.taken = 0  # steps whose inputs were put on the device
        self.filled = self.fill(read_every)
        if self.filled == 0:
            raise ValueError("there are no batches")
        first = {name: tensor[None] for name, tensor in path.start.items()}
        with evaluation_mode(module):
            choice.prepare(first, self._inputs(), points=points)
        self.engine: Engine = choice.chosen
        halves = self.engine.network.parameters_in_half()
        interior = dict(self.views)
        if self.copy is not None:
            self.copy.copy_(self.weight)
            of_copy = _views(self.copy, shapes, channels_last)
            interior |= {name: of_copy[name] for name in firsts if name in halves}
        tied = {name: interior[first] for name, first in self.trained.items()}
        self.network_path = Path(self.start, self.fixed | tied, self.end)
        self.ends = {
            name: torch.stack([t, self.end[name]]).to(tied[name].dtype if name in tied else t.dtype)
            for name, t in self.start.items()
        }

    def fill(self, count: int) -> int:
        """Put what the following steps need on the device, `read_every` at most; how many."""
        found = list(self.source.take(min(count, self.read_every)))
        if not found:
            return 0
        leaves = [pytree.tree_flatten(one) for one in found]
        stacked = [torch.stack(same) for same in zip(*(one for one, _ in leaves), strict=True)]
        if self.kept is None:
            self.form = leaves[0][1]
            self.kept = [
                t.new_empty((self.read_every, *t.shape[1:]), device=self.weight.device)
                for t in stacked
            ]
        for buffer, t in zip(self.kept, stacked, strict=True):
            if buffer.shape[1:] != t.shape[1:]:
                raise ValueError(
                    f"all batches must have one shape, got {list(t.shape[1:])} after "
                    f"{list(buffer.shape[1:])}"
                )
            buffer[: len(t)].copy_(t)
        rates = [self.descent.rate(self.taken + i) for i in range(len(found))]
        self.rates[: len(found)].copy_(torch.tensor(rates, dtype=self.rates.dtype))
        self.taken += len(found)
        self.turn.zero_()
        return len(found)

    def run(self) -> None:
        """One step, operation by operation; nothing waits for the device."""
        with evaluation_mode(self.module), matmul_precision(self.precision):
            inputs = self._inputs()
            with torch.no_grad():
                ends = logits_of(self.engine.network(self.ends, inputs))
            energies, gradient = energy_and_gradient(
                self.network_path, self.engine, inputs, self.trained, ends
            )
            torch._foreach_copy_(
                list(self.gradients.values()), [gradient[name] for name in self.gradients]
            )
            path_update(
                *(self.weight, self.gradient, self.rates.index_select(0, self.turn)[0]),
                precondition=self.descent.precondition,
                momentum=self.descent.momentum,
                nesterov=self.descent.momentum > 0,
                velocity=self.velocity,
                copy=self.copy,
            )
            self.energies.index_copy_(0, self.turn, energies[None].to(self.energies))
            self.turn += 1

    def capture(self) -> None:
        """Record the step as a CUDA graph, which `step` then replays; leaves the weights alone."""
        rates = self.rates.clone()
        self.rates.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.turn.zero_()
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.turn.zero_()
        with torch.cuda.graph(graph):
            self.run()
        self.rates.copy_(rates)
        if self.velocity is not None:
            self.velocity.zero_()
        self.energies.zero_()
        self.captured = graph

    def step(self) -> None:
        """One step on the inputs whose turn it is."""
        if self.captured is None:
            self.run()
        else:
            self.captured.replay()

    def path(self) -> Path:
        """A copy of the path as it is now."""
        own = {name: self.views[first] for name, first in self.trained.items()}
        interior = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in (self.fixed | own).items()
        }
        return Path(self.start, interior, self.end)

    def _inputs(self) -> Inputs:
        kept = [buffer.index_select(0, self.turn)[0] for buffer in self.kept]
        return self.source.inputs(pytree.tree_unflatten(kept, self.form))


def optimize_static(
    path: Path,
    module: nn.Module,
    batches: Augmented | Iterable,
    *,
    steps: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    lr_schedule: str = "constant",
    precondition: bool = True,
    precision: str = "fp32",
    channels_last: bool | None = None,
    chunk: int | None = None,
    memory_budget: int | str | None = None,
    capture: bool | None = None,
    read_every: int = 50,
    on_read: Callable[[list[dict], Path], None] | None = None,
) -> Path:
    """`fastgeo.optimize` with a step that a GPU replays, and energies that are read now and then.

    The steps are the same up to rounding.

    Args:
        path, module, lr, momentum, lr_schedule, precondition, precision, chunk, memory_budget: as
            in `fastgeo.optimize`; the module must be one that can be traced.
        batches: `Augmented`, whose batches are made on the device, or inputs as in
            `fastgeo.optimize`, all of one shape, of which `read_every` are copied at a time.
        steps: how many.
        channels_last: memory format of images and weights; by default on a GPU.
        capture: whether the step is captured in a CUDA graph; by default on a GPU.
        read_every: steps between two looks at the energies, and for which inputs are kept.
        on_read: called after so many steps with {"step", "energy": nats, "sqrt_jsd"} of each, and
            the path behind them.

    Returns:
        A new path with the same ends.

    Raises:
        TypeError: a path, module or batches of another type.
        ValueError: as `fastgeo.optimize`, an energy that is not finite when it is read, a module
            that cannot be traced, or batches that differ in shape.

    Example:
        >>> digits = fastgeo.data.load("digits")
        >>> batches = Augmented(digits, 128, torch.Generator().manual_seed(0))
        >>> path = optimize_static(path, module, batches, steps=100)
    """
    if steps < 1 or read_every < 1:
        raise ValueError(f"steps and read_every must be at least 1, got {steps} and {read_every}")
    static = StaticStep(
        *(path, module, batches if isinstance(batches, Augmented) else Given(batches)),
        lr=lr,
        momentum=momentum,
        lr_schedule=lr_schedule,
        steps=steps,
        precondition=precondition,
        precision=precision,
        channels_last=channels_last,
        chunk=chunk,
        memory_budget=memory_budget,
        read_every=min(read_every, steps),
    )
    if capture is None:
        capture = path.device.type == "cuda"
    if capture:
        static.capture()
    taken, filled = 0, static.filled
    while True:
        for _ in range(filled):
            static.step()
        metrics = _metrics(static.energies[:filled], taken, lr)
        taken += filled
        if on_read is not None:
            on_read(metrics, static.path())
        if taken == steps:
            break
        filled = static.fill(steps - taken)
        if filled == 0:
            raise ValueError(f"batches ended after {taken} of {steps} steps")
    if not static.weight.isfinite().all():
        raise ValueError(f"the path is not finite after step {taken - 1}; lower lr (now {lr})")
    return static.path()


def _metrics(energies: Tensor, first: int, lr: float) -> list[dict]:
    """Of steps from `first` on, [K, E] nats; this is where the host waits."""
    energies = energies.cpu()
    for i, edge in (~energies.isfinite()).nonzero().tolist():
        raise ValueError(
            f"optimisation stopped at step {first + i}: the divergence of edge {edge} is "
            f"{energies[i, edge].item()}; lower lr (now {lr}), or look at the inputs and the ends"
        )
    sums, lengths = energies.sum(1).tolist(), energies.sqrt().sum(1).tolist()
    return [
        {"step": first + i, "energy": energy, "sqrt_jsd": length}
        for i, (energy, length) in enumerate(zip(sums, lengths, strict=True))
    ]


def _views(flat: Tensor, shapes: dict[str, torch.Size], channels_last: bool) -> dict[str, Tensor]:
    """name -> [M, ...] in its place of [M, P]; weights of images with their channels innermost."""
    views, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + shape[1:].numel()
        part = flat[:, begin:end]
        if channels_last and len(shape) == 5:
            points, out, channels, *kernel = shape
            views[name] = part.unflatten(1, (out, *kernel, channels)).movedim(-1, 2)
        else:
            views[name] = part.unflatten(1, shape[1:]) if len(shape) > 1 else part[:, 0]
        begin = end
    return views
