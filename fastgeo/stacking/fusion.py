"""Normalisation, residual sum and ReLU as one operation, which has a kernel.

A normalisation's result waits until something else than a sum or a ReLU looks at it; those join it.
Without a GPU it is then computed as it would have been, in the same order.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_layer_norm
from fastgeo_kernels.stacked.norm import channel_norm_twice, group_norm_twice
from torch import Tensor

from fastgeo.stacking.stacked import Stacked


class Waiting(NamedTuple):
    """A normalisation that is yet to be computed, and what joined it.

    Attributes:
        norm: "group" for GroupNorm with one group, "layer" for LayerNorm over the last of an
            image's axes, "channel" for the same with the channels where they are in images.
        x, weight, bias, eps: [N, B, ...], [N, C], [N, C].
        grad: whether gradients were enabled.
        needs: whether it needs one.
        residual: added to it; of the same shape.
        relu: whether a ReLU is behind.
        alone: the normalisation by itself, whose value is taken where it is known by then.
    """

    norm: str
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    grad: bool
    needs: bool
    residual: Stacked | None = None
    relu: bool = False
    alone: Stacked | None = None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def uses(self) -> tuple[Stacked | None, Stacked | None]:
        """The `Stacked` values that it waits for."""
        return self.alone, self.residual

    def value(self) -> tuple[Tensor, Tensor]:
        """[N, B, ...], and the same for a sum, as `Stacked.added`."""
        if torch.is_grad_enabled() == self.grad and not torch.is_inference_mode_enabled():
            return self._value()
        with torch.inference_mode(False), torch.set_grad_enabled(self.grad):
            return self._value()

    def _value(self) -> tuple[Tensor, Tensor]:
        residual = None if self.residual is None else self.residual.added
        if self.alone is not None and self.alone.waiting is None:
            y = self.alone.tensor
            y = y if residual is None else y + residual
            y = F.relu(y) if self.relu else y
            return y, y
        given = (self.weight, self.bias, self.eps)
        if self.norm == "layer":
            y = stacked_layer_norm(self.x, self.x.shape[-1:], *given)
            return y, y
        if self.norm == "group":
            return group_norm_twice(self.x, 1, *given, residual=residual, relu=self.relu)
        return channel_norm_twice(self.x, *given, residual=residual, relu=self.relu)


def waiting(norm: str, input: Any, weight: Any, bias: Any, eps: float) -> Stacked | None:
    """The result of a normalisation, to be computed later; None if it cannot wait.

    What all networks share may be changed in place in the meantime, which nobody would see.
    """
    given = [t for t in (input, weight, bias) if t is not None]
    if torch.is_inference_mode_enabled() or not all(isinstance(t, Stacked) for t in given):
        return None
    x, weight, bias = input.tensor, *(t if t is None else t.tensor for t in (weight, bias))
    if torch.is_autocast_enabled(x.device.type):
        return None
    grad = torch.is_grad_enabled()
    needs = grad and any(t._tensor.requires_grad for t in given)
    return Stacked.later(Waiting(norm, x, weight, bias, eps, grad, needs))


def joins(value: Any) -> bool:
    """Whether a sum or ReLU may join what is waiting."""
    own = value.waiting if isinstance(value, Stacked) else None
    return (
        isinstance(own, Waiting)
        and own.norm != "layer"
        and not own.relu
        and own.grad == torch.is_grad_enabled()
    )


def with_sum(a: Any, b: Any) -> Stacked | None:
    """a + b of one network, if that joins one of them."""
    for value, other in ((a, b), (b, a)):
        if joins(value) and value.waiting.residual is None and _fits(value, other):
            own = value.waiting
            needs = own.grad and (own.needs or other.tensor.requires_grad)
            return Stacked.later(own._replace(residual=other, alone=value, needs=needs))
    return None


def with_relu(value: Any) -> Stacked | None:
    """Its ReLU, if that joins it."""
    if not joins(value):
        return None
    own = value.waiting
    alone = value if own.alone is None else own.alone
    return Stacked.later(own._replace(relu=True, alone=alone))


def with_permutation(value: Any, dims: tuple[int, ...]) -> Stacked | None:
    """A LayerNorm whose channels are put where they are in images, if it waits."""
    own = value.waiting if isinstance(value, Stacked) else None
    if not isinstance(own, Waiting) or own.norm != "layer" or tuple(dims) != (0, 3, 1, 2):
        return None
    return Stacked.later(own._replace(norm="channel", x=own.x.permute(0, 1, 4, 2, 3)))


def _fits(own: Stacked, other: Any) -> bool:
    if other is own or not isinstance(other, Stacked):
        return False
    with torch._C.DisableTorchFunctionSubclass():
        return other.shape == own.shape and other.dtype == own.dtype
