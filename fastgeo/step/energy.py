"""An objective of a path on one batch, and its gradient: chunk by chunk, nothing computed twice."""

import weakref

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


def energy_and_gradient(
    path: Path,
    engine: Engine,
    inputs: Inputs,
    trained: dict[str, str],
    ends: Tensor,
    counted: Tensor | None = None,
    counts: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Divergence of each edge on a batch, [E] nats, and their sum's gradient [N - 2, ...].

    The points are coupled through their logits only, so a chunk of them is done with as soon as the
    first logits of the next one are known: at most two chunks' activations are alive.

    Args:
        ends: [2, R, C] logits of the two ends, R rows.
        counted: [B, ...], which of the rows count; None for all.
        counts: [E], what each edge counts in the sum; 1 by default.
    """
    chunks = engine.chunks(len(path) - 2)
    energies, whole = [], _room(path, trained, chunks)
    left, current = ends[:1], _Chunk(path, engine, inputs, trained, chunks[0])
    check_rows(counted, current.rows)
    weight = None if counted is None else counted.flatten().to(ends.device)
    for i in range(len(chunks)):
        following = None
        if i + 1 < len(chunks):
            following = _Chunk(path, engine, inputs, trained, chunks[i + 1])
        right = ends[1:] if following is None else following.logits[:1].detach()
        known = torch.cat([left, current.logits.detach(), right])
        edges = None if counts is None else counts[chunks[i].start : chunks[i].stop + 1]
        with phase("divergence"):
            divergences, gradient = path_js_div_value_and_grad(known, edges, sample_weight=weight)
        energies.append(divergences if following is None else divergences[:-1])
        left = known[-2:-1]
        gradients = current.backward(gradient[1:-1])
        for name, tensor in whole.items():
            tensor[chunks[i]] = gradients[name]
        if following is not None:
            current = following
    return torch.cat(energies), whole or gradients


def losses_and_gradient(
    path: Path,
    engine: Engine,
    inputs: Inputs,
    trained: dict[str, str],
    labels: Tensor,
    counted: Tensor | None = None,
    *,
    check: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of each point between the ends, [N - 2] nats, and their mean's gradient.

    Args:
        labels: [B, ...], as in `label_rows`, which `check` is of.
        counted: [B, ...], which of the rows count; None for all whose label is not -100.
    """
    chunks = engine.chunks(len(path) - 2)
    losses, whole = [], _room(path, trained, chunks)
    for part in chunks:
        chunk = _Chunk(path, engine, inputs, trained, part)
        logits = chunk.logits.detach().requires_grad_()
        with torch.enable_grad(), phase("divergence"):
            found = cross_entropies(chunk.outputs, logits, labels, counted, check=check)
            (gradient,) = torch.autograd.grad(found.sum() / (len(path) - 2), logits)
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
    """Logits of the two ends, which never change: kept while the inputs that gave them live."""

    def __init__(self, path: Path):
        self.params = {}
        for name, start in path.start.items():
            end = path.end[name]
            alike = name not in path.interior and torch.equal(start, end)
            self.params[name] = (
                start.expand(2, *start.shape) if alike else torch.stack([start, end])
            )
        self.known = WeakIdKeyDictionary()  # first tensor of the inputs -> _Known

    @torch.no_grad()
    def __call__(self, given: Inputs, inputs: Inputs, engine: Engine) -> Tensor:
        """[2, R, C] on a batch.

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
