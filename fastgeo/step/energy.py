"""An objective of a path on one batch, and its gradient: chunk by chunk, nothing computed twice."""

import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from fastgeo_kernels import path_js_div_value_and_grad
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastgeo.data.inputs import Inputs, tensors_of
from fastgeo.data.outputs import IGNORED, check_rows, label_rows, logits_of
from fastgeo.path import Path
from fastgeo.stacking.module import part_of
from fastgeo.step.engines import Engine
from fastgeo.step.phases import phase

MOST_CACHED = 2**28  # bytes of logits and inputs that EndLogits keeps


class Beside(Protocol):
    """Logits of what is beside some points.

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
    """The two ends of a path, whose logits [2, R, C] are known."""

    upwards = True

    def __init__(self, logits: Tensor):
        self._logits = logits

    def evaluated(self, part: slice, logits: Tensor) -> None:
        pass

    def left(self) -> Tensor:
        return self._logits[:1]

    def right(self) -> Tensor:
        return self._logits[1:]


def energy_and_gradient(
    path: Path,
    engine: Engine,
    inputs: Inputs,
    trained: dict[str, str],
    beside: Tensor | Beside,
    counted: Tensor | None = None,
    counts: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of each edge on a batch, [E] nats, and their sum's gradient [N - 2, ...].

    The points are coupled through their logits only, so a chunk of them is done with as soon as the
    first logits of the next one are known: at most two chunks' activations are alive.

    Args:
        beside: [2, R, C] logits of the two ends, R rows, or what gives them.
        counted: [B, ...], which of the rows count; None for all.
        counts: [E], what each edge counts in the sum; 1 by default.
        scale: what the gradient is multiplied by.
    """
    beside = Ends(beside) if isinstance(beside, Tensor) else beside
    chunks = engine.chunks(len(path) - 2)
    chunks = chunks if beside.upwards else chunks[::-1]
    energies, whole = {}, _room(path, trained, chunks)
    passed: Tensor | None = None  # logits of the point that the last chunk ended with

    def evaluate(part: slice) -> _Chunk:
        chunk = _Chunk(path, engine, inputs, trained, part)
        beside.evaluated(part, chunk.logits.detach())
        return chunk

    current = evaluate(chunks[0])
    check_rows(counted, current.rows)
    weight = None if counted is None else counted.flatten().to(current.logits.device)
    for i, part in enumerate(chunks):
        following = evaluate(chunks[i + 1]) if i + 1 < len(chunks) else None
        coming = None if following is None else following.logits.detach()
        if beside.upwards:
            left = beside.left() if passed is None else passed
            right = beside.right() if coming is None else coming[:1]
        else:
            left = beside.left() if coming is None else coming[-1:]
            right = beside.right() if passed is None else passed
        known = torch.cat([left, current.logits.detach(), right])
        edges = None if counts is None else counts[part.start : part.stop + 1]
        with phase("divergence"):
            divergences, gradient = path_js_div_value_and_grad(known, edges, sample_weight=weight)
            gradient = gradient if scale == 1 else gradient.mul_(scale)
        last = part.stop == len(path) - 2
        energies[part.start] = divergences if last else divergences[:-1]
        passed = known[-2:-1] if beside.upwards else known[1:2]
        gradients = current.backward(gradient[1:-1])
        for name, tensor in whole.items():
            tensor[part] = gradients[name]
        if following is not None:
            current = following
    return torch.cat([energies[first] for first in sorted(energies)]), whole or gradients


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
    chunks = engine.chunks(len(path) - 2)
    losses, whole = [], _room(path, trained, chunks)
    for part in chunks:
        chunk = _Chunk(path, engine, inputs, trained, part)
        logits = chunk.logits.detach().requires_grad_()
        with torch.enable_grad(), phase("divergence"):
            found = cross_entropies(chunk.outputs, logits, labels, counted, check=check)
            (gradient,) = torch.autograd.grad(scale * found.sum() / (len(path) - 2), logits)
        losses.append(found.detach())
        gradients = chunk.backward(gradient)
        for name, tensor in whole.items():
            tensor[part] = gradients[name]
    return torch.cat(losses), whole or gradients


def cross_entropies(
    outputs: Tensor, logits: Tensor, labels: Tensor, counted: Tensor | None, *, check: bool = True
) -> Tensor:
    """[K] nats, of outputs [K, B, ..., C], which are logits [K, R, C]; 0 where no row counts."""
    rows = label_rows("batches", labels, outputs, counted, check=check)
    precise = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    every = rows.expand(len(logits), -1)
    each = F.cross_entropy(precise, every.flatten(), reduction="none", ignore_index=IGNORED)
    return each.view_as(every).sum(1) / (rows != IGNORED).sum().clamp(min=1)


def _room(path: Path, trained: dict[str, str], chunks: list[slice]) -> dict[str, Tensor]:
    """For the gradients of several chunks; {} for one, whose own are the whole.

    It is taken first of all, so that it does not lie scattered between activations.
    """
    names = set(trained.values()) if len(chunks) > 1 else ()
    return {name: torch.empty_like(path.interior[name]) for name in names}


class _Chunk:
    """Some interior points with their logits, and the way back."""

    def __init__(
        self, path: Path, engine: Engine, inputs: Inputs, trained: dict[str, str], part: slice
    ):
        self.leaves = {
            name: path.interior[name][part].detach().requires_grad_()
            for name in dict.fromkeys(trained.values())
        }
        params = part_of(path.stacked_interior(), part)
        tied = {name: self.leaves[first] for name, first in trained.items()}
        with torch.enable_grad(), phase("forward"):
            self.outputs = engine.network(params | tied, inputs)  # [K, B, ..., C]
            self.logits = logits_of(self.outputs)  # [K, R, C]
        self.rows = self.outputs.shape[1:-1]

    def backward(self, gradient: Tensor) -> dict[str, Tensor]:
        """The gradient of every trained parameter [K, ...], given that of the logits."""
        with phase("backward"):
            gradients = torch.autograd.grad(
                self.logits,
                list(self.leaves.values()),
                gradient.to(self.logits),
                materialize_grads=True,
            )
        return dict(zip(self.leaves, gradients, strict=True))


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
    def __call__(self, given: Inputs, inputs: Inputs, engine: Engine) -> Tensor:
        """[2, R, C] on a batch, or of the one end.

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
            logits = logits_of(engine.forward(self.params, inputs))
        if not any(tensor.is_inference() for tensor in tensors):  # those have no version
            known = _Known(given, logits)
            if known.bytes + sum(other.bytes for other in self.known.values()) <= MOST_CACHED:
                self.known[tensors[0]] = known
        return logits


class _Known:
    """Logits, and what tells that inputs are those that gave them."""

    def __init__(self, given: Inputs, logits: Tensor):
        self.logits, self.others, tensors = logits, self._others(given), tensors_of(given)
        self.tensors = [weakref.ref(tensor) for tensor in tensors]
        self.versions = [tensor._version for tensor in tensors]
        # What NumPy writes into the memory of a tensor changes no version.
        self.copies = [
            tensor.clone() if tensor.device.type == "cpu" else None for tensor in tensors
        ]
        self.bytes = logits.nbytes + sum(c.nbytes for c in self.copies if c is not None)

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
