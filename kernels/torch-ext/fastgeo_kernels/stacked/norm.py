"""Normalisation layers of N stacked networks, with the residual sum and the ReLU behind them.

On a GPU one kernel each way (`group_norm.py`, `channel_norm.py`), else plain PyTorch
(`plain.py`). A network has one of these behind every convolution, so they are autograd
functions that launch by themselves: a registered operator would cost the host three times as much a
call. The networks are the vectorisation; torch.func.vmap over a call raises.
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launching import use_triton
from . import channel_norm, group_norm, plain
from .layout import channels_innermost, channels_third

MOST_CHANNELS = 4096


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps: float, relu: bool) -> Tuple[Tensor, Tensor]:
        rows = _both(x, residual)
        y, mean, rstd = group_norm.group_forward(*rows, weight, bias, eps, relu)
        sign = y if relu and residual is not None else None
        ctx.save_for_backward(rows[0], sign, weight, bias, mean, rstd)
        ctx.shape, ctx.relu, ctx.residual = x.shape, relu, residual is not None
        return _twice(ctx, y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        if all(dy is None for dy in upstream):
            return (None,) * 6
        x, y, weight, bias, mean, rstd = ctx.saved_tensors
        given = (x, y, *_upstream(ctx, x, *upstream), weight, bias, mean, rstd, ctx.relu)
        return _gradients(ctx, weight, bias, *group_norm.group_backward(*given))


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps: float, relu: bool) -> Tuple[Tensor, Tensor]:
        rows = _both(x, residual)
        y = channel_norm.channel_forward(*rows, weight, bias, eps, relu)
        sign = y if relu and residual is not None else None
        ctx.save_for_backward(rows[0], sign, weight, bias)
        ctx.shape, ctx.relu, ctx.residual, ctx.eps = x.shape, relu, residual is not None, eps
        return _twice(ctx, y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        if all(dy is None for dy in upstream):
            return (None,) * 6
        x, y, weight, bias = ctx.saved_tensors
        given = (x, y, *_upstream(ctx, x, *upstream), weight, bias, ctx.eps, ctx.relu)
        return _gradients(ctx, weight, bias, *channel_norm.channel_backward(*given))


def _both(x: Tensor, residual: Optional[Tensor]) -> Tuple[Tensor, Optional[Tensor]]:
    rows = _to_rows(x)
    return rows, None if residual is None else _to_rows(residual, like=rows)


def _twice(ctx, y: Tensor, shape: torch.Size) -> Tuple[Tensor, Tensor]:
    """The result for two uses, in the same memory; their gradients come apart, or one is None."""
    ctx.set_materialize_grads(False)
    return _from_rows(y, shape), _from_rows(y, shape)


def _upstream(
    ctx, x: Tensor, first: Optional[Tensor], second: Optional[Tensor]
) -> Tuple[Tensor, Optional[Tensor]]:
    """The gradient of a result, and that of its other use if the kernel is to add it."""
    one, *others = (_to_rows(dy, like=x) for dy in (first, second) if dy is not None)
    if others and ctx.residual and not ctx.relu:  # the residual's gradient is the sum itself
        return one + others[0], None
    return one, others[0] if others else None


def _gradients(ctx, weight, bias, dx, dresidual, dparams) -> Tuple[Optional[Tensor], ...]:
    """Of x, weight, bias, residual, eps and relu."""
    dweight, dbias = dparams[0].to(weight.dtype), dparams[1].to(bias.dtype)
    dresidual = _from_rows(dresidual, ctx.shape) if ctx.residual else None
    return _from_rows(dx, ctx.shape), dweight, dbias, dresidual, None, None


def _to_rows(x: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """[N, B, C, ...] -> [B, S, N, C], S pixels."""
    return channels_innermost(x[..., None] if x.ndim == 3 else x.flatten(3), like)


def _from_rows(rows: Tensor, shape: torch.Size) -> Tensor:
    """[B, S, N, C] -> [N, B, C, ...], a view."""
    return channels_third(rows).view(shape)


def stacked_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    residual: Optional[Tensor] = None,
    relu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """GroupNorm of N networks, each with its own affine map, a residual sum and ReLU behind it.

    Equivalent to::

        y = torch.stack([F.group_norm(x[i], num_groups, weight[i], bias[i], eps) for i in range(N)])
        y = y if residual is None else y + residual
        y = F.relu(y) if relu else y

    Args:
        x: [N, B, C, ...], floating point.
        num_groups: groups of channels in one network; 1 takes statistics over C, H and W.
        weight, bias: [N, C]; 1 and 0 by default.
        eps: added to the variance.
        residual: [N, B, C, ...], added to the normalised values.
        relu: whether the sum is rectified.
        impl: "triton" (on a GPU; on a CPU under TRITON_INTERPRET=1), "torch", or "auto": Triton on
            a GPU for one group of fp32, bf16 or fp16, else PyTorch. Triton keeps statistics and
            arithmetic in fp32 and wants (B, H, W, N, C) or (N, B, H, W, C) in memory, or copies.

    Returns:
        [N, B, C, ...] in x's dtype. Differentiable, in Triton once.

    Raises:
        ValueError: x, weight or residual of another shape, an unknown impl.
        RuntimeError: impl="triton" where it cannot run; the message says what is missing.

    Example:
        >>> x = torch.randn(3, 8, 16, 5, 5)  # 3 networks, 8 images, 16 channels
        >>> stacked_group_norm(x, 1, relu=True).shape
        torch.Size([3, 8, 16, 5, 5])
    """
    given = (x, num_groups, weight, bias, eps)
    return group_norm_twice(*given, residual=residual, relu=relu, impl=impl)[0]


def group_norm_twice(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    residual: Optional[Tensor] = None,
    relu: bool = False,
    impl: str = "auto",
) -> Tuple[Tensor, Tensor]:
    """`stacked_group_norm` for two uses, such as a convolution and the sum behind it.

    Their gradients are then added in the kernel, which autograd would do in a pass of its own.
    """
    _check("stacked_group_norm", x, weight, bias, residual)
    unfit = _unfit(x, residual) or ("" if num_groups == 1 else f"it has {num_groups} groups, not 1")
    if not use_triton("stacked_group_norm", impl, x, unfit):
        y = plain.group_norm(x, num_groups, weight, bias, eps, residual, relu)
        return y, y
    return _GroupNorm.apply(x, *_affine(x, weight, bias), residual, float(eps), relu)


def stacked_channel_norm(
    x: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    residual: Optional[Tensor] = None,
    relu: bool = False,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm over the channels at each pixel of N networks, a residual sum and ReLU behind it.

    Equivalent to::

        norm = lambda x, w, b: F.layer_norm(x.movedim(1, -1), w.shape, w, b, eps).movedim(-1, 1)
        y = torch.stack([norm(x[i], weight[i], bias[i]) for i in range(N)])
        y = y if residual is None else y + residual
        y = F.relu(y) if relu else y

    Args, Returns, Raises:
        as `stacked_group_norm`.

    Example:
        >>> stacked_channel_norm(torch.randn(3, 8, 16, 5, 5)).mean(2).abs().max() < 1e-5
        tensor(True)
    """
    given = (x, weight, bias, eps)
    return channel_norm_twice(*given, residual=residual, relu=relu, impl=impl)[0]


def channel_norm_twice(
    x: Tensor,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
    *,
    residual: Optional[Tensor] = None,
    relu: bool = False,
    impl: str = "auto",
) -> Tuple[Tensor, Tensor]:
    """`stacked_channel_norm` for two uses, as `group_norm_twice`."""
    _check("stacked_channel_norm", x, weight, bias, residual)
    if not use_triton("stacked_channel_norm", impl, x, _unfit(x, residual)):
        y = plain.channel_norm(x, weight, bias, eps, residual, relu)
        return y, y
    return _ChannelNorm.apply(x, *_affine(x, weight, bias), residual, float(eps), relu)


def _affine(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    shape = x.shape[0], x.shape[2]
    weight = x.new_ones(shape) if weight is None else weight.contiguous()
    return weight, x.new_zeros(shape) if bias is None else bias.contiguous()


def _check(
    name: str,
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
) -> None:
    if x.ndim < 3:
        raise ValueError(f"{name}: x must be [N, B, C, ...], got {list(x.shape)}")
    affine = x.shape[0], x.shape[2]
    expected: Dict[str, Tuple[int, ...]] = dict(weight=affine, bias=affine, residual=x.shape)
    for own, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is not None and tuple(tensor.shape) != expected[own]:
            raise ValueError(
                f"{name}: {own} must be {list(expected[own])} for x {list(x.shape)}, got "
                f"{list(tensor.shape)}; {plain.SHARED}"
            )


def _unfit(x: Tensor, residual: Optional[Tensor]) -> str:
    if x.shape[2] > MOST_CHANNELS:
        return f"it takes up to {MOST_CHANNELS} channels, got {x.shape[2]}"
    if residual is not None and residual.dtype != x.dtype:
        return f"the residual is {str(residual.dtype)[6:]}, the input {str(x.dtype)[6:]}"
    return "the input is empty" if x.numel() == 0 else ""
