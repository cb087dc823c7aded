"""Layers of N stacked networks in plain PyTorch: every network's weights in one operation.

Convolutions, GroupNorm and LayerNorm over channels have kernels as well: `conv.py` and
`norm.py` call what is here where those do not run.

An image-like value is logically [N, B, C, H, W] and physically (B, N, C, H, W), or (B, H, W, N, C)
in channels-last, as on GPUs: the [B, N*C, H, W] tensor that a convolution with N groups reads and
writes is a free view of either. Convolutions of one network each, on GPUs, leave (N, B, H, W, C).
A value that all N networks share has stride 0 along N (`x.expand(N, ...)`).
"""

from __future__ import annotations

import math
from typing import Callable, Iterable, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ELEMENTS = 2**31 - 1  # of a tensor on a GPU, before cuDNN takes much slower kernels
SHARED = "what all N networks share is given as x.expand(N, *x.shape)"
WIDENS = torch.backends.cpu.get_cpu_capability() == "AVX2"  # whether this CPU does, see `_product`


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    stride: Union[int, Sequence[int]],
    padding: Union[int, Sequence[int], str],
    dilation: Union[int, Sequence[int]],
    groups: int,
) -> Tensor:
    """`stacked_conv` in plain PyTorch; what all networks share is convolved once, densely."""
    points = len(weight)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 4]
    innermost = weight.ndim == 5 and x.stride(2) == 1
    if innermost and weight.shape[3:] == (1, 1) and not x.is_cuda:
        x, stride, padding = _read_pixels(x, stride, padding)
    if _alone(x, weight):
        weight = _innermost(weight)
        biases = [None] * points if bias is None else bias.unbind(0)
        options = (stride, padding, dilation, groups)
        return around(
            _product(convolution, *own, *options)
            for own in zip(x.unbind(0), weight.unbind(0), biases)
        )
    shared = x.stride(0) == 0 and groups == 1
    images, weight, bias = _folded(x, weight, bias, shared)
    groups = 1 if shared else points * groups
    options = (stride, padding, dilation, groups)
    return _unfold(_product(convolution, images, weight, bias, *options), points)


def _read_pixels(x: Tensor, stride, padding) -> Tuple[Tensor, int, int]:
    """The pixels that a 1x1 convolution reads, and its stride and padding over those.

    With a stride, oneDNN's weight gradient of few channels that lie innermost writes where it must
    not (uxlfoundation/oneDNN#6035).
    """
    if isinstance(padding, str):  # "valid" or "same", which are alike here
        padding = 0
    down, across = (stride,) * 2 if isinstance(stride, int) else tuple(stride)
    above, left = (padding,) * 2 if isinstance(padding, int) else tuple(padding)
    if above or left:
        x = F.pad(x, (left, left, above, above))
    return x[..., ::down, ::across], 1, 0


def _alone(x: Tensor, weight: Tensor) -> bool:
    """Whether each network has a convolution of its own: on a GPU, where one of all networks would
    have more elements than 32 bits count, which is slow."""
    largest = len(x) * x.shape[1] * max(x.shape[2], weight.shape[1]) * math.prod(x.shape[3:])
    return x.is_cuda and weight.ndim == 5 and largest > MOST_ELEMENTS


def around(images: Iterable[Tensor]) -> Tensor:
    """[N, B, C, ...], (N, B, ..., C) in memory, of the [B, C, ...] of each network."""
    return torch.stack([own.movedim(1, -1) for own in images]).movedim(-1, 2)


def lies_around(x: Tensor) -> bool:
    """Whether [N, B, C, ...] has (N, B, ..., C) in memory, and no [B, N*C, ...] view."""
    return x.movedim(2, -1).is_contiguous() and min(len(x), x.shape[1]) > 1


def stacked_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Union[int, Sequence[int]] = 1,
    padding: Union[int, Sequence[int]] = 0,
    output_padding: Union[int, Sequence[int]] = 0,
    groups: int = 1,
    dilation: Union[int, Sequence[int]] = 1,
) -> Tensor:
    """N transposed convolutions, one a network, as one with N groups.

    Equivalent to, in two dimensions::

        torch.stack([F.conv_transpose2d(x[i], weight[i], bias[i], ...) for i in range(N)])

    Args:
        x: [N, B, C, ...] with one, two or three spatial axes.
        weight: [N, C, O / groups, ...].
        bias: [N, O].
        stride, padding, output_padding, groups, dilation: of each network, as in
            `torch.nn.functional.conv_transpose2d`.

    Returns:
        [N, B, O, ...].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    points = check_convolution("stacked_conv_transpose", x, weight)
    convolution = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 4]
    images, weight, bias = _folded(x, weight, bias, False)
    options = (stride, padding, output_padding, points * groups, dilation)
    return _unfold(_product(convolution, images, weight, bias, *options), points)


def _product(function: Callable[..., Tensor], *given) -> Tensor:
    """A convolution or matrix product, and so its gradients.

    On CPUs with AVX2 and no AVX-512 PyTorch's own in half precision are many times slower than in
    fp32, in which products of halves are exact: there it is computed in fp32 and rounded once, as
    matrix units do; what is kept for the backward pass is in fp32, too.
    """
    kinds = {(t.dtype, t.device.type) for t in given if isinstance(t, Tensor)}
    if not (WIDENS and kinds in ({(torch.bfloat16, "cpu")}, {(torch.float16, "cpu")})):
        return function(*given)
    wide = (t.float() if isinstance(t, Tensor) else t for t in given)
    return function(*wide).to(given[0].dtype)


def check_convolution(name: str, x: Tensor, weight: Tensor) -> int:
    if weight.ndim not in (4, 5, 6):
        raise ValueError(
            f"{name}: weight must be [N, O, C, ...] with one to three spatial axes, got "
            f"{list(weight.shape)}"
        )
    return _check_stacked(name, x, weight.ndim, weight, weight.ndim)


def _folded(
    x: Tensor, weight: Tensor, bias: Optional[Tensor], shared: bool
) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """[B, N*C, ...] inputs (or the shared ones), weight and bias of one convolution."""
    images = x[0] if shared else _fold(x)
    if x.is_cuda and weight.ndim == 5:
        weight = _innermost(weight)
        images = images.contiguous(memory_format=torch.channels_last)
    return images, weight.flatten(0, 1), None if bias is None else bias.flatten()


def _innermost(weight: Tensor) -> Tensor:
    """[N, O, C, KH, KW] whose first axes merge into a channels-last tensor; one copy at most."""
    return weight.movedim(2, -1).contiguous().movedim(-1, 2)


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
        out = _product(torch.bmm, rows, weight.mT)
    else:
        out = _product(torch.baddbmm, bias[:, None], rows, weight.mT)
    return out.view(*x.shape[:-1], weight.shape[1])


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    residual: Optional[Tensor] = None,
    relu: bool = False,
) -> Tensor:
    """`stacked_group_norm` in plain PyTorch: one GroupNorm with N times the groups."""
    points = len(x)
    if lies_around(x):
        absent = [None] * points
        given = (absent if t is None else t.unbind(0) for t in (weight, bias, residual))
        return around(
            _sum_and_relu(F.group_norm(own, num_groups, w, b, eps), r, relu)
            for own, w, b, r in zip(x.unbind(0), *given)
        )
    weight, bias = (None if t is None else t.flatten() for t in (weight, bias))
    y = F.group_norm(_fold(x), points * num_groups, weight, bias, eps)
    return _unfold(_sum_and_relu(y, None if residual is None else _fold(residual), relu), points)


def channel_norm(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    residual: Optional[Tensor] = None,
    relu: bool = False,
) -> Tensor:
    """`stacked_channel_norm` in plain PyTorch."""
    y = stacked_layer_norm(x.movedim(2, -1), x.shape[2:3], weight, bias, eps)
    return _sum_and_relu(y.movedim(-1, 2), residual, relu)


def _sum_and_relu(y: Tensor, residual: Optional[Tensor], relu: bool) -> Tensor:
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def stacked_layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm over the last axes of N networks, each with its own affine map.

    Equivalent to::

        torch.stack([F.layer_norm(x[i], normalized_shape, weight[i], bias[i], eps)
                     for i in range(N)])

    Args:
        x: [N, ..., *normalized_shape].
        normalized_shape: the axes of one network over which statistics are taken.
        weight, bias: [N, *normalized_shape].
        eps: added to the variance.

    Returns:
        [N, ..., *normalized_shape].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    _check_stacked("stacked_layer_norm", x, None, weight, 1 + len(normalized_shape))
    out = F.layer_norm(x, normalized_shape, eps=eps)
    if weight is not None:
        out = out * _beside(weight, x)
    if bias is not None:
        out = out + _beside(bias, x)
    return out


def stacked_rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Optional[Tensor] = None,
    eps: Optional[float] = None,
) -> Tensor:
    """RMSNorm over the last axes of N networks, each with its own factors.

    Equivalent to::

        torch.stack([F.rms_norm(x[i], normalized_shape, weight[i], eps) for i in range(N)])

    Args:
        x: [N, ..., *normalized_shape].
        normalized_shape: the axes of one network over which the mean square is taken.
        weight: [N, *normalized_shape].
        eps: added to the mean square; the machine epsilon of x by default.

    Returns:
        [N, ..., *normalized_shape].

    Raises:
        ValueError: x or weight with another number of dimensions or networks.
    """
    _check_stacked("stacked_rms_norm", x, None, weight, 1 + len(normalized_shape))
    out = F.rms_norm(x, normalized_shape, eps=eps)
    return out if weight is None else out * _beside(weight, x)


def _beside(factors: Tensor, x: Tensor) -> Tensor:
    """[N, *shape] as [N, 1, ..., *shape] of x's rank."""
    return factors.reshape(len(factors), *(1,) * (x.ndim - factors.ndim), *factors.shape[1:])


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
        raise ValueError(f"{name}: x must have {x_ndim} dimensions, got {list(x.shape)}; {SHARED}")
    if weight is not None and (weight.ndim != weight_ndim or weight.shape[0] != x.shape[0]):
        raise ValueError(
            f"{name}: weight must have {weight_ndim} dimensions, the first of them N as in x "
            f"{list(x.shape)}, got {list(weight.shape)}; {SHARED}"
        )
    return x.shape[0]
