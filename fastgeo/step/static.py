"""The optimisation of a path on static buffers: a step that a CUDA graph can hold.

Weights of all interior points lie in one tensor [N - 2, P], and gradients in another; what makes
the inputs of many steps waits on the device, and so do the energies until they are read. A step is
then a fixed sequence of operations on fixed memory that the host does not look at: augmentation,
forward pass, divergence, backward pass, update. On a GPU it is captured once and replayed;
elsewhere the same object runs it operation by operation.
"""

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fastgeo_kernels import path_update
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgeo.data.inputs import Inputs
from fastgeo.data.outputs import logits_of, rows_that_count
from fastgeo.forward.modes import evaluation_mode
from fastgeo.optimize import trained_names
from fastgeo.path import Path, check_path_of
from fastgeo.stacking.precision import matmul_precision
from fastgeo.step.descent import Descent
from fastgeo.step.energy import energy_and_gradient
from fastgeo.step.engines import Engine, EngineChoice
from fastgeo.step.sources import Source

WARM_UP = 3  # steps before a capture, in which libraries choose and compile what they run


class StaticStep:
    """A step of `fastgeo.optimize` that always works on the same memory.

    Args:
        first: number of the first step, of all `steps`, which the rate depends on.
        take: steps for which inputs are put on the device; `read_every` by default.
        velocity: first name -> [N - 2, ...] to go on with; zeros by default.
        lengths: whether the path is measured before every step.
        choice: of the step on a coarser path, whose engine is checked already.
        most: interior points of the finest path to come, if those are more.
        Others as of `optimize_static`.

    Attributes:
        weight: [N - 2, P], the trained parameters of the interior points side by side.
        energies: [K, E] nats, of the steps since the inputs were filled.
        lengths: [K], Σ‖Δθ‖ of the path before these steps; None if it is not measured.
        filled: steps for which the constructor put inputs on the device.
        captured: the CUDA graph, if there is one.
    """

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        source: Source,
        *,
        lr: float = 0.1,
        momentum: float = 0.0,
        lr_schedule: str = "constant",
        steps: int | None = None,
        precondition: bool = True,
        precision: str = "fp32",
        output: str = "logits",
        mask: str | None = None,
        channels_last: bool | None = None,
        chunk: int | None = None,
        memory_budget: int | str | None = None,
        read_every: int = 50,
        first: int = 0,
        take: int | None = None,
        velocity: Mapping[str, Tensor] | None = None,
        lengths: bool = False,
        on_choice: Callable[[dict], None] | None = None,
        choice: EngineChoice | None = None,
        most: int | None = None,
    ):
        check_path_of(path, module)
        self.module, self.source, self.read_every = module, source, read_every
        self.precision, self.mask = precision, mask
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
        if choice is not None:
            choice.next_level()
        self.choice = choice or EngineChoice(
            module,
            engine="stacked",
            channels_last=channels_last,
            chunk=chunk,
            memory_budget=memory_budget,
            precision=precision,
            output=output,
            on_choice=on_choice,
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
        self.velocities = {}  # name -> [N - 2, ...], views
        if self.velocity is not None:
            self.velocities = _views(self.velocity, shapes, channels_last)
            for name, tensor in (velocity or {}).items():
                self.velocities[name].copy_(tensor)
        precise = torch.promote_types(dtype, torch.float32)
        self.rates = torch.zeros(read_every, dtype=precise, device=device)
        self.turn = torch.zeros(1, dtype=torch.long, device=device)
        self.energies = torch.zeros(read_every, points + 1, dtype=precise, device=device)
        self.lengths = torch.zeros_like(self.energies[:, 0]) if lengths else None
        self.kept = None  # [K, ...] of every tensor that the source gives
        self.captured: torch.cuda.CUDAGraph | None = None
        self.taken = first  # steps whose inputs were put on the device
        self.filled = self.fill(read_every if take is None else take)
        if self.filled == 0:
            raise ValueError(
                f"batches ended after {first} of {steps} steps" if first else "there are no batches"
            )
        first = {name: tensor[None] for name, tensor in path.start.items()}
        with evaluation_mode(module):
            self.choice.prepare(first, self._batch()[0], points=points, most=most)
        self.engine: Engine = self.choice.chosen
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
        flat = [_tensors_and_form(one) for one in found]
        if self.kept is None:
            first, self.form = flat[0]
            size, device = self.read_every, self.weight.device
            self.kept = [t.new_empty((size, *t.shape), device=device) for t in first]
        expected = [list(buffer.shape[1:]) for buffer in self.kept]
        for leaves, form in flat:
            shapes = [list(t.shape) for t in leaves]
            if form != self.form or shapes != expected:
                raise ValueError(
                    "steps on static buffers take batches of one shape, and alike beside their "
                    "tensors (in a DataLoader drop_last=True), got "
                    f"{_words(shapes)} after {_words(expected)}"
                )
        for i, buffer in enumerate(self.kept):
            buffer[: len(flat)].copy_(torch.stack([leaves[i] for leaves, _ in flat]))
        rates = [self.descent.rate(self.taken + i) for i in range(len(found))]
        self.rates[: len(found)].copy_(torch.tensor(rates, dtype=self.rates.dtype))
        self.taken += len(found)
        self.turn.zero_()
        return len(found)

    def run(self) -> None:
        """One step, operation by operation; nothing waits for the device."""
        with evaluation_mode(self.module), matmul_precision(self.precision):
            inputs, counted = self._batch()
            with torch.no_grad():
                ends = logits_of(self.engine.network(self.ends, inputs))
            if self.lengths is not None:
                length = self._masters().euclidean().sum()
                self.lengths.index_copy_(0, self.turn, length[None].to(self.lengths))
            energies, gradient = energy_and_gradient(
                self.network_path, self.engine, inputs, self.trained, ends, counted
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

    def warm_up(self, steps: int = WARM_UP) -> None:
        """Steps that leave everything as it was, in which libraries choose and compile what they
        run."""
        rates = self.rates.clone()
        velocity = None if self.velocity is None else self.velocity.clone()
        self.rates.zero_()
        for _ in range(steps):
            self.turn.zero_()
            self.run()
        self.turn.zero_()
        self.rates.copy_(rates)
        if self.velocity is not None:
            self.velocity.copy_(velocity)
        self.energies.zero_()

    def capture(self) -> None:
        """Record the step as a CUDA graph, which `step` then replays; leaves the weights alone."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # or what only cycles hold stays beside the graph's own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # nothing runs
            self.run()
        self.captured = graph

    def step(self) -> None:
        """One step on the inputs whose turn it is."""
        if self.captured is None:
            self.run()
        else:
            self.captured.replay()

    def path(self) -> Path:
        """A copy of the path as it is now."""
        interior = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in self._masters().interior.items()
        }
        return Path(self.start, interior, self.end)

    def _masters(self) -> Path:
        own = {name: self.views[first] for name, first in self.trained.items()}
        return Path(self.start, self.fixed | own, self.end)

    def _batch(self) -> tuple[Inputs, Tensor | None]:
        """Inputs of the step whose turn it is, and which rows count."""
        form, others = self.form
        tensors = (buffer.index_select(0, self.turn)[0] for buffer in self.kept)
        leaves = [next(tensors) if other is Tensor else other for other in others]
        inputs = self.source.inputs(pytree.tree_unflatten(leaves, form))
        return inputs, rows_that_count(inputs, None, self.mask)


def _tensors_and_form(value: Any) -> tuple[list[Tensor], tuple]:
    """All tensors in a value, and what it is beside them."""
    leaves, form = pytree.tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors, (form, [Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _words(shapes: list[list[int]]) -> str:
    return ", ".join(map(str, shapes))


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
