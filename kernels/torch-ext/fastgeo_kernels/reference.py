"""The plain PyTorch of every operation: the oracle, and what runs without Triton.

Divergence of neighbouring rows p = softmax(x), q = softmax(y), m = (p + q) / 2, written with
d = log p - log q = (x - y) - (lse_x - lse_y):

    log(p / m) = s + min(d, 0),  log(q / m) = s + min(-d, 0),  s = -log1p(expm1(-|d|) / 2)
    JSD        = 1/4 sum (p + q) h,   h = d tanh(d / 2) - 2 log cosh(d / 2) >= 0
    dJSD / dx  = 1/2 p (log(p / m) - KL(p || m))

Every term of the sum is non-negative and nothing in it is the difference of two larger numbers, so
the value is never negative, exactly 0 for equal rows, and never NaN for finite logits. JSD: Lin,
"Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991). Path energy
and lengths: Tan et al., "Geodesic Mode Connectivity", ICLR 2023 Tiny Papers, Eqs. 1 and 2.

Stacked layers keep an image-like value logically [N, B, C, H, W] and physically (B, H, W, N, C) on
GPUs, (B, N, C, H, W) on CPUs: the [B, N*C, H, W] tensor that a convolution with N groups reads and
writes is a free view of either. A value that all N networks share has stride 0 along N
(`x.expand(N, ...)`).
"""

from __future__ import annotations

import math
from typing import Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LN2 = math.log(2.0)


# --- Divergence and length along a path of logits -------------------------------------------------


def path_js_div(logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Jensen-Shannon divergence between neighbouring rows of a path of logits.

    In exact arithmetic the same as::

        p = logits.softmax(-1)
        m = (p[:-1] + p[1:]) / 2
        kl = lambda p: (p * (p / m).log()).sum(-1)
        (kl(p[:-1]) + kl(p[1:])).div(2).mean(-1)

    Args:
        logits: [N, B, C] with N >= 2, floating point. Computed in fp32 (fp64 for fp64 logits).
        reduction: "batchmean" averages over B; "none" keeps every row.

    Returns:
        [E] or [E, B] nats, E = N - 1, each within [0, ln 2]; fp32 (fp64 for fp64 logits).
        Differentiable once.

    Raises:
        TypeError: logits that are not a floating point tensor.
        ValueError: another shape than [N >= 2, B >= 1, C >= 1], or an unknown reduction.

    Example:
        >>> path_js_div(torch.zeros(3, 5, 10))
        tensor([0., 0.])
    """
    _check_logits(logits)
    return _reduce(_PathJSDiv.apply(logits), reduction)


def path_js_div_value_and_grad(
    logits: Tensor, edge_weight: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor]:
    """Divergence of every edge, and the gradient of their (weighted) sum, in one call.

    Equivalent to::

        value = path_js_div(logits)
        (grad,) = torch.autograd.grad((edge_weight * value).sum(), logits)

    Args:
        logits: [N, B, C] with N >= 2, floating point.
        edge_weight: [E], one weight an edge; all 1 by default.

    Returns:
        [E] nats (fp32, or fp64 for fp64 logits), unweighted; and [N, B, C] in the logits' dtype.

    Raises:
        TypeError, ValueError: as `path_js_div`, and for an edge_weight that is not [E].

    Example:
        >>> value, grad = path_js_div_value_and_grad(torch.randn(25, 256, 10))
        >>> value.shape, grad.shape
        (torch.Size([24]), torch.Size([25, 256, 10]))
    """
    _check_logits(logits)
    edges, batch = logits.shape[0] - 1, logits.shape[1]
    if edge_weight is not None and edge_weight.shape != (edges,):
        raise ValueError(f"edge_weight must be [E] = [{edges}], got {list(edge_weight.shape)}")
    with torch.no_grad():
        p, delta = _softmax_and_log_ratio(logits)
        value = _jensen_shannon(p, delta).mean(-1)
        scale = delta.new_full((edges, 1), 1 / batch)
        if edge_weight is not None:
            scale = scale * edge_weight.to(scale)[:, None]
        grad = _jensen_shannon_grad(p, delta, scale)
    return value, grad.to(logits.dtype)


@torch.no_grad()
def path_fisher_rao(logits: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """Fisher-Rao distance between neighbouring rows of a path of logits; not differentiable.

    In exact arithmetic the same as::

        p = logits.softmax(-1)
        d = 2 * (p[:-1] * p[1:]).sqrt().sum(-1).acos()
        d.square().mean(-1).sqrt()

    but evaluated as 4 asin(|sqrt p - sqrt q| / 2), which keeps its digits for near-equal rows.

    Args:
        logits: [N, B, C] with N >= 2, floating point.
        reduction: "batchmean" gives the distance of the joint distributions p(x) p(y | x), the
            root mean square over B; "none" the distance of every row.

    Returns:
        [E] or [E, B] radians, each within [0, pi]; fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError: as `path_js_div`.

    Example:
        >>> path_fisher_rao(torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]])) / torch.pi
        tensor([1.])
    """
    _check_logits(logits)
    p, delta = _softmax_and_log_ratio(logits)
    larger = torch.maximum(p[:-1], p[1:])
    # |sqrt p - sqrt q| = sqrt(max(p, q)) (1 - exp(-|delta| / 2))
    hellinger = (larger * torch.expm1(delta.abs() / -2).square()).sum(-1).sqrt()
    distance = 4 * torch.asin((hellinger / 2).clamp(max=math.sqrt(0.5)))
    if reduction == "batchmean":
        return distance.square().mean(-1).sqrt()
    return _reduce(distance, reduction)


class _PathJSDiv(torch.autograd.Function):
    """[N, B, C] logits -> [E, B] nats, any upstream gradient, first order only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor) -> Tensor:
        return _jensen_shannon(*_softmax_and_log_ratio(logits))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return _jensen_shannon_grad(*_softmax_and_log_ratio(logits), upstream).to(logits.dtype)


def _softmax_and_log_ratio(logits: Tensor) -> Tuple[Tensor, Tensor]:
    """Probabilities [N, B, C] and d = log p - log q of neighbouring rows [E, B, C]."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    lse = x.logsumexp(-1, keepdim=True)
    p = torch.exp(x - lse)
    delta = (x[:-1] - x[1:]) - (lse[:-1] - lse[1:])
    # The rounding of the two lse shifts a whole row of delta, which ruins the value of near-equal
    # rows. One Newton step on sum(p - q) = 2 sum(m tanh(d / 2)) = 0 removes the shift; rows far
    # apart (small slope) do not need it.
    m = (p[:-1] + p[1:]) / 2
    t = torch.tanh(delta / 2)
    slope = (m * (1 - t * t)).sum(-1, keepdim=True)
    shift = 2 * (m * t).sum(-1, keepdim=True) / slope.clamp(min=0.5)
    return p, torch.where(slope > 0.5, delta - shift, delta)


def _jensen_shannon(p: Tensor, delta: Tensor) -> Tensor:
    """[N, B, C], [E, B, C] -> [E, B] nats."""
    a = delta.abs()
    z = a / 2
    near = z * torch.tanh(z) - torch.log1p(2 * torch.sinh(z / 2).square())
    e = torch.exp(-a)
    far = LN2 - torch.log1p(e) - a * e / (1 + e)
    half_h = torch.where(a < 2, near, far)
    return ((p[:-1] + p[1:]) * half_h).sum(-1).div(2).clamp(max=LN2)


def _jensen_shannon_grad(p: Tensor, delta: Tensor, upstream: Tensor) -> Tensor:
    """[N, B, C], [E, B, C], upstream [E, B or 1] -> d(sum upstream * JSD) / dlogits [N, B, C]."""
    s = -torch.log1p(torch.expm1(-delta.abs()) / 2)
    grad = torch.zeros_like(p)
    for rows, sign in ((slice(None, -1), 1), (slice(1, None), -1)):
        log_ratio = s + (sign * delta).clamp(max=0)  # log(p / m), then log(q / m)
        kl = (p[rows] * log_ratio).sum(-1, keepdim=True)
        grad[rows] += (upstream[..., None] / 2) * p[rows] * (log_ratio - kl)
    return grad


def _reduce(per_row: Tensor, reduction: str) -> Tensor:
    if reduction == "batchmean":
        return per_row.mean(-1)
    if reduction == "none":
        return per_row
    raise ValueError(f"reduction must be 'batchmean' or 'none', got {reduction!r}")


def _check_logits(logits: Tensor) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating point tensor, got {kind}")
    if logits.ndim != 3 or logits.shape[0] < 2 or 0 in logits.shape:
        raise ValueError(
            f"logits must be [N, B, C] with N >= 2, B >= 1, C >= 1, got {list(logits.shape)}"
        )


# --- Layers of N stacked networks -----------------------------------------------------------------


def stacked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Union[int, Sequence[int]] = 1,
    padding: Union[int, Sequence[int], str] = 0,
    dilation: Union[int, Sequence[int]] = 1,
    groups: int = 1,
) -> Tensor:
    """N convolutions, one a network, as one convolution with N groups.

    Equivalent to::

        torch.stack([F.conv2d(x[i], weight[i], bias[i], ...) for i in range(N)])

    Args:
        x: [N, B, C, H, W], or a [B, C, H, W] image shared by all networks as `x.expand(N, ...)`,
            which is one dense convolution with N * O output channels.
        weight: [N, O, C / groups, kh, kw].
        bias: [N, O].
        stride, padding, dilation, groups: of each network, as in `torch.nn.functional.conv2d`.

    Returns:
        [N, B, O, H', W'].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    points = _check_stacked("stacked_conv2d", x, 5, weight, 5)
    weight = weight.flatten(0, 1)
    bias = None if bias is None else bias.flatten()
    shared = x.stride(0) == 0 and groups == 1
    images = x[0] if shared else _fold(x)
    if x.is_cuda:
        weight = weight.contiguous(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    groups = 1 if shared else points * groups
    return _unfold(F.conv2d(images, weight, bias, stride, padding, dilation, groups), points)


def stacked_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """N linear layers, one a network, as one batched matrix product.

    Equivalent to::

        torch.stack([F.linear(x[i], weight[i], bias[i]) for i in range(N)])

    Args:
        x: [N, ..., I].
        weight: [N, O, I].
        bias: [N, O].

    Returns:
        [N, ..., O].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    points = _check_stacked("stacked_linear", x, None, weight, 3)
    rows = x.reshape(points, -1, x.shape[-1])
    if bias is None:
        out = torch.bmm(rows, weight.mT)
    else:
        out = torch.baddbmm(bias[:, None], rows, weight.mT)
    return out.view(*x.shape[:-1], weight.shape[1])


def stacked_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """GroupNorm of N networks, each with its own affine map, as one with N times the groups.

    Equivalent to::

        torch.stack([F.group_norm(x[i], num_groups, weight[i], bias[i], eps) for i in range(N)])

    Args:
        x: [N, B, C, ...].
        num_groups: groups of channels in one network; 1 takes statistics over C, H and W.
        weight, bias: [N, C].
        eps: added to the variance.

    Returns:
        [N, B, C, ...].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    points = _check_stacked("stacked_group_norm", x, None, weight, 2)
    weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    return _unfold(F.group_norm(_fold(x), points * num_groups, weight, bias, eps), points)


def stacked_layer_norm(
    x: Tensor, weight: Optional[Tensor] = None, bias: Optional[Tensor] = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm over the last axis of N networks, each with its own affine map.

    Equivalent to::

        torch.stack([F.layer_norm(x[i], (C,), weight[i], bias[i], eps) for i in range(N)])

    Args:
        x: [N, ..., C].
        weight, bias: [N, C].
        eps: added to the variance.

    Returns:
        [N, ..., C].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    _check_stacked("stacked_layer_norm", x, None, weight, 2)
    out = F.layer_norm(x, x.shape[-1:], eps=eps)
    between = (1,) * (x.ndim - 2)
    if weight is not None:
        out = out * weight.view(len(weight), *between, -1)
    if bias is not None:
        out = out + bias.view(len(bias), *between, -1)
    return out


def _fold(x: Tensor) -> Tensor:
    """[N, B, C, ...] -> [B, N*C, ...], a view of what `_unfold` gave."""
    return x.transpose(0, 1).flatten(1, 2)


def _unfold(x: Tensor, points: int) -> Tensor:
    """[B, N*C, ...] -> [N, B, C, ...], a view."""
    return x.unflatten(1, (points, -1)).transpose(0, 1)


def _check_stacked(
    name: str, x: Tensor, x_ndim: Optional[int], weight: Optional[Tensor], weight_ndim: int
) -> int:
    """The number of networks, after checking that x and weight agree on it."""
    if x_ndim is not None and x.ndim != x_ndim:
        raise ValueError(f"{name}: x must have {x_ndim} dimensions, got {list(x.shape)}")
    if weight is not None and (weight.ndim != weight_ndim or weight.shape[0] != x.shape[0]):
        raise ValueError(
            f"{name}: weight must have {weight_ndim} dimensions, the first of them N as in x "
            f"{list(x.shape)}, got {list(weight.shape)}"
        )
    return x.shape[0]
