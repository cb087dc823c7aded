"""Logits of some points: as they are, or those of a large vocabulary some rows at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastgeo.data.outputs import logits_of
from fastgeo.stacking.products import AsItIs, Product, Products, PulledBack

LARGE = 2**26  # logits of all points that are looked at together: there are never more at once


def most_of_each(points: int) -> int:
    """How many logits each of so many points may have, if they are to be looked at together."""
    return LARGE // points


def most_in(work: str, points: int, scale: float = 1.0) -> int | None:
    """`most` of `StackedModule.by_rows` in a step on so many points; None where it is not asked.

    Args:
        work: a key of `fastgeo.step.memory.COPIES`.
        scale: how many times as many inputs a step has.
    """
    return None if work == "training" else int(most_of_each(points + 2) / scale)


class Logits:
    """[K, R, C] of K points, without a gradient.

    Args:
        outputs: [k, B, ..., C] of some points each, as tensors or as products.

    Attributes:
        shape: [K, B, ..., C] of the outputs.
    """

    def __init__(self, outputs: Sequence[Tensor | Product]):
        first = outputs[0]
        self.shape = torch.Size([sum(one.shape[0] for one in outputs), *first.shape[1:]])
        logits_of(self.like)
        parts = [o.detach().flatten(1, -2) if isinstance(o, Tensor) else o for o in outputs]
        tensors = [part for part in parts if isinstance(part, Tensor)]
        together = 1 < len(tensors) == len(parts)
        self._parts = [torch.cat(tensors)] if together else parts

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def like(self) -> Tensor:
        """A tensor of the outputs' shape, without numbers."""
        return torch.empty(self.shape, device="meta")

    @property
    def rows(self) -> int:
        """R."""
        return self.shape[1:-1].numel()

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def tensors(self) -> list[Tensor]:
        """Those that are kept."""
        parts = (
            [part] if isinstance(part, Tensor) else part.parts.values() for part in self._parts
        )
        return [tensor for part in parts for tensor in part]

    def of(self, rows: slice = slice(None)) -> Tensor:
        """[K, r, C] of some rows."""
        found = [p[:, rows] if isinstance(p, Tensor) else p.rows(rows) for p in self._parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def first(self) -> "Logits":
        """Those of the first point."""
        return self._one(0, slice(0, 1))

    def last(self) -> "Logits":
        """Those of the last point."""
        return self._one(-1, slice(-1, None))

    def slices(self, beside: int = 0) -> list[slice]:
        """The rows in parts, of which so many points beside these are looked at as well."""
        if all(isinstance(part, Tensor) for part in self._parts):
            return [slice(0, self.rows)]
        size = max(1, LARGE // ((len(self) + beside) * self.shape[-1]))
        return [slice(i, min(i + size, self.rows)) for i in range(0, self.rows, size)]

    def spread(self) -> slice:
        """Rows from all over, so few that several copies of them may be looked at together."""
        count = max(1, most_of_each(4 * len(self)) // self.shape[-1])
        return slice(0, self.rows, -(-self.rows // count))

    def _one(self, at: int, point: slice) -> "Logits":
        part = self._parts[at]
        if isinstance(part, Tensor):
            part = part[point].unflatten(1, self.shape[1:-1])
        else:
            part = part.points(point)
        return Logits([part])


class Evaluated(Logits):
    """Logits of a pass, and the way back from the gradient to them.

    Args:
        outputs: as of `StackedModule.by_rows`.
    """

    def __init__(self, outputs: Tensor | Products):
        self._outputs = outputs if isinstance(outputs, Products) else [outputs]
        super().__init__(self._outputs)
        self._back: list[AsItIs | PulledBack] = []

    @property
    def requires_grad(self) -> bool:
        return any(
            one.requires_grad if isinstance(one, Tensor) else one.needs for one in self._outputs
        )

    def add(self, rows: slice, gradient: Tensor) -> None:
        """gradient: [K, r, C], to the logits of some rows."""
        if not self._back:
            self._back = [
                AsItIs(one) if isinstance(one, Tensor) else PulledBack(one) for one in self._outputs
            ]
        sizes = [one.shape[0] for one in self._outputs]
        for back, own in zip(self._back, gradient.split(sizes), strict=True):
            back.add(rows, own)

    def gradients(self, to: Sequence[Tensor], **options: bool) -> tuple[Tensor, ...]:
        """The gradient to leaves of the pass; `options` are those of torch.autograd.grad."""
        pairs = [pair for back in self._back for pair in back.gathered()]
        tensors, upstream = [t for t, _ in pairs], [gradient for _, gradient in pairs]
        return torch.autograd.grad(tensors, to, upstream, **options)
