"""An objective of a path on one batch, and its gradient: chunk by chunk, nothing computed twice."""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from fastgeo_kernels import path_js_div, path_js_div_value_and_grad
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastgeo.data.inputs import Inputs, tensors_of
from fastgeo.data.outputs import IGNORED, check_rows, label_rows
from fastgeo.path import Path
from fastgeo.stacking.module import part_of
from fastgeo.step.engines import Engine
from fastgeo.step.logits import Evaluated, Logits, most_of_each
from fastgeo.step.phases import phase

MOST_CACHED = 2**28  # bytes of logits and inputs that EndLogits keeps


class Beside(Protocol):
    """Logits of what is beside some points, which wants theirs as well, all at once.

    Attributes:
        upwards: whether to go along the points from the left to the right.
    """

    upwards: bool

    def evaluated(self, part: slice, logits: Tensor) -> None:
        """The logits [K, R, C] of some of the points are known."""

    def left(self) -> Tensor:
        """[1, R, C] of the point before the first one."""

    def right(self) -> Tensor:
        """[1, R, C] of the point behind the last one."""


class Ends:
    """The two ends of a path, whose logits are known."""

    upwards = True

    def __init__(self, logits: Logits):
        self._logits = logits

    def left(self) -> Logits:
        return self._logits.first()

    def right(self) -> Logits:
        return self._logits.last()


def energy_and_gradient(
    path: Path,
    engine: Engine,
    inputs: Inputs,
    trained: dict[str, str],
    beside: Logits | Beside,
    counted: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of each edge on a batch, [E] nats, and their sum's gradient [N - 2, ...].

    The points are coupled through their logits only, so a chunk of them is done with as soon as the
    first logits of the next one are known: at most two chunks' activations are alive. The logits of
    a large vocabulary never are, all of a chunk at once: divergence and gradient go over its rows.

    Args:
        beside: logits of the two ends, or what gives those of what is beside the points.
        counted: [B, ...], which of the rows count; None for all.
        counts: [E], what each edge counts in the sum; 1 by default.
        scale: what the gradient is multiplied by.
    """
    sides = Ends(beside) if isinstance(beside, Logits) else beside
    chunks = engine.chunks(len(path) - 2)
    chunks = chunks if sides.upwards else chunks[::-1]
    energies, room = {}, _room(path, trained, chunks)
    passed: Logits | None = None  # of the point that the last chunk ended with

    def evaluate(part: slice) -> _Chunk:
        if isinstance(sides, Ends):
            most = most_of_each(part.stop - part.start + 2)
            return _Chunk(path, engine, inputs, trained, part, most)
        chunk = _Chunk(path, engine, inputs, trained, part, None)
        sides.evaluated(part, chunk.logits.of())
        return chunk

    current = evaluate(chunks[0])
    check_rows(counted, current.logits.shape[1:-1])
    weight = None if counted is None else counted.flatten().to(current.logits.device)
    for i, part in enumerate(chunks):
        following = evaluate(chunks[i + 1]) if i + 1 < len(chunks) else None
        coming, own = None if following is None else following.logits, current.logits
        if sides.upwards:
            left = _logits(sides.left()) if passed is None else passed
            right = _logits(sides.right()) if coming is None else coming.first()
        else:
            left = _logits(sides.left()) if coming is None else coming.last()
            right = _logits(sides.right()) if passed is None else passed
        edges = None if counts is None else counts[part.start : part.stop + 1]
        divergences = current.divergences(left, right, edges, weight, scale)
        last = part.stop == len(path) - 2
        energies[part.start] = divergences if last else divergences[:-1]
        passed = own.last() if sides.upwards else own.first()
        gradients = current.backward()
        for name, tensor in room.items():
            tensor[part] = gradients[name]
        if following is not None:
            current = following
    return torch.cat([energies[first] for first in sorted(energies)]), room or gradients


def losses_and_gradient(
    path: Path,
    engine: Engine,
    inputs: Inputs,
    trained: dict[str, str],
    labels: Tensor,
    counted: Tensor | None = None,
    *,
    check: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each point between the ends, [N - 2] nats, and their mean's gradient.

    Args:
        labels: [B, ...], as in `label_rows`, which `check` is of.
        counted: [B, ...], which of the rows count; None for all whose label is not -100.
        scale: what the gradient is multiplied by.
    """
    points = len(path) - 2
    chunks = engine.chunks(points)
    losses, room = [], _room(path, trained, chunks)
    for part in chunks:
        chunk = _Chunk(path, engine, inputs, trained, part, most_of_each(part.stop - part.start))
        targets = label_rows("batches", labels, chunk.logits.like, counted, check=check)
        losses.append(chunk.losses(targets, scale, points))
        gradients = chunk.backward()
        for name, tensor in room.items():
            tensor[part] = gradients[name]
    return torch.cat(losses), room or gradients


def divergences(logits: Logits, weight: Tensor | None) -> Tensor:
    """[K - 1] nats between neighbours of K points.

    Args:
        weight: [R], which of the rows count; None for all.
    """
    slices = logits.slices()
    return _summed(
        lambda rows: path_js_div(logits.of(rows), **_in_mean(rows, slices, weight)), slices
    )


def cross_entropies(logits: Logits, labels: Tensor, counted: Tensor | None) -> Tensor:
    """[K] nats of K points, of labels [B, ...]; 0 where no row counts."""
    targets = label_rows("batches", labels, logits.like, counted)
    return _summed(lambda rows: _losses(logits.of(rows), targets, rows), logits.slices())


def _summed(function: Callable[[slice], Tensor], slices: list[slice]) -> Tensor:
    """Over the slices of rows, of which a function leaves nothing behind but its value."""
    return functools.reduce(torch.add, map(function, slices))


def _losses(logits: Tensor, targets: Tensor, rows: slice) -> Tensor:
    """[K], what the logits [K, r, C] of some rows are of the mean over targets [R]."""
    precise = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    every = targets[rows].expand(len(logits), -1)
    each = F.cross_entropy(precise, every.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view_as(every).sum(1) / (targets != IGNORED).sum().clamp(min=1)


def _logits(beside: Logits | Tensor) -> Logits:
    return Logits([beside]) if isinstance(beside, Tensor) else beside


def _in_mean(rows: slice, slices: list[slice], weight: Tensor | None) -> dict[str, Any]:
    """The options of the divergence by which values of slices add up to the mean over all rows."""
    own = None if weight is None else weight[rows]
    if len(slices) == 1:
        return {"sample_weight": own}
    count = slices[-1].stop if weight is None else weight.sum()
    return {"sample_weight": own, "normalizer": count}


def _room(path: Path, trained: dict[str, str], chunks: list[slice]) -> dict[str, Tensor]:
    """For the gradients of several chunks; {} for one, whose own are the whole.

    It is taken first of all, so that it does not lie scattered between activations.
    """
    names = set(trained.values()) if len(chunks) > 1 else ()
    return {name: torch.empty_like(path.interior[name]) for name in names}


class _Chunk:
    """Some interior points with their logits, and the way back.

    Args:
        most: as of `StackedModule.by_rows`; None for logits as they are.
    """

    def __init__(
        self,
        path: Path,
        engine: Engine,
        inputs: Inputs,
        trained: dict[str, str],
        part: slice,
        most: int | None,
    ):
        self.leaves = {
            name: path.interior[name][part].detach().requires_grad_()
            for name in dict.fromkeys(trained.values())
        }
        params = part_of(path.stacked_interior(), part)
        tied = {name: self.leaves[first] for name, first in trained.items()}
        with torch.enable_grad(), phase("forward"):
            outputs = engine.network.by_rows(params | tied, inputs, most)
        self.logits = Evaluated(outputs)

    def divergences(
        self,
        left: Logits,
        right: Logits,
        edges: Tensor | None,
        weight: Tensor | None,
        scale: float,
    ) -> Tensor:
        """[K + 1] nats of the edges of these points, whose gradient `backward` is given."""
        slices = self.logits.slices(beside=2)

        def of(rows: slice) -> Tensor:
            own = _in_mean(rows, slices, weight)
            with phase("divergence"):
                known = torch.cat([one.of(rows) for one in (left, self.logits, right)])
                value, gradient = path_js_div_value_and_grad(known, edges, **own)
                gradient = gradient if scale == 1 else gradient.mul_(scale)
            self._add(rows, gradient[1:-1])
            return value

        return _summed(of, slices)

    def losses(self, targets: Tensor, scale: float, points: int) -> Tensor:
        """[K] nats of targets [R], likewise; of so many points the mean is descended on."""

        def of(rows: slice) -> Tensor:
            logits = self.logits.of(rows).requires_grad_()
            with torch.enable_grad(), phase("divergence"):
                found = _losses(logits, targets, rows)
                (gradient,) = torch.autograd.grad(scale * found.sum() / points, logits)
            self._add(rows, gradient)
            return found.detach()

        return _summed(of, self.logits.slices())

    def backward(self) -> dict[str, Tensor]:
        """The gradient of every trained parameter [K, ...]."""
        with phase("backward"):
            leaves = list(self.leaves.values())
            gradients = self.logits.gradients(leaves, materialize_grads=True)
        return dict(zip(self.leaves, gradients, strict=True))

    def _add(self, rows: slice, gradient: Tensor) -> None:
        with phase("backward"):
            self.logits.add(rows, gradient)


class EndLogits:
    """Logits of the two ends, which never change: kept while the inputs that gave them live.

    Args:
        ends: which of them, 0 for the start and 1 for the end.
    """

    def __init__(self, path: Path, ends: Sequence[int] = (0, 1)):
        self.params = {}
        for name, start in path.start.items():
            end = path.end[name]
            alike = name not in path.interior and torch.equal(start, end)
            both = [start, end]
            self.params[name] = (
                start.expand(len(ends), *start.shape)
                if alike
                else torch.stack([both[i] for i in ends])
            )
        self.known = WeakIdKeyDictionary()  # first tensor of the inputs -> _Known

    @torch.no_grad()
    def __call__(self, given: Inputs, inputs: Inputs, engine: Engine) -> Logits:
        """On a batch, of both or of the one end.

        Args:
            given: the batch as it came, by which it is known when it comes again.
            inputs: the same on the device of the path.
            engine: evaluates it the first time.
        """
        tensors = tensors_of(given)
        known = self.known.get(tensors[0])
        if known is not None and known.same(given):
            return known.logits
        with phase("forward"):
            logits = engine.logits(self.params, inputs)
        if not any(tensor.is_inference() for tensor in tensors):  # those have no version
            known = _Known(given, logits, self.params)
            if known.bytes + sum(other.bytes for other in self.known.values()) <= MOST_CACHED:
                self.known[tensors[0]] = known
        return logits


class _Known:
    """Logits, and what tells that inputs are those that gave them.

    Args:
        params: of which logits by rows are made as well.
    """

    def __init__(self, given: Inputs, logits: Logits, params: dict[str, Tensor]):
        self.logits, self.others, tensors = logits, self._others(given), tensors_of(given)
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        self.versions = [tensor._version for tensor in tensors]
        # What NumPy writes into the memory of a tensor changes no version.
        self.copies = [
            tensor.clone() if tensor.device.type == "cpu" else None for tensor in tensors
        ]
        held = {tensor.untyped_storage().data_ptr() for tensor in params.values()}
        own = [t for t in logits.tensors if t.untyped_storage().data_ptr() not in held]
        self.bytes = sum(tensor.nbytes for tensor in (*own, *self.copies) if tensor is not None)

    def same(self, given: Inputs) -> bool:
        if self._others(given) != self.others:
            return False
        for tensor, one, version, copy in zip(
            tensors_of(given), self.tensors, self.versions, self.copies, strict=True
        ):
            if one() is not tensor or tensor._version != version:
                return False
            if copy is not None and not torch.equal(copy, tensor):
                return False
        return True

    @staticmethod
    def _others(given: Inputs) -> str:
        """Names, and values that are no tensors."""
        if isinstance(given, Tensor):
            return ""
        others = {k: "tensor" if isinstance(v, Tensor) else v for k, v in given.items()}
        return repr(others)
