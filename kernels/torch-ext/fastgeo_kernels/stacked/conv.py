"""Convolutions of N stacked networks, each of its three products run in the way that is fastest.

The output, the gradient of the input and that of the weights can each be one grouped convolution,
one convolution a network, which writes its part of one tensor, or an own kernel
(`conv_kernels.py`); `conv_table.py` says which for which shape. All take (B, H, W, N, C) and
(N, B, H, W, C) in memory; the grouped way copies from the latter, the dense one from the former.
There is no normalisation in the epilogue: a program has a part of an image, so GroupNorm's
statistics would need a pass over partial sums and still the read of its output that
`group_norm.py` makes.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Callable, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..launching import HALF_AND_SINGLE, triton, use_triton
from . import conv_kernels, conv_table, plain
from .conv_table import DENSE, TABLE, Shape, Ways
from .layout import channels_innermost, channels_third, empty_like

OWN = Ways("triton", "triton", "triton")


def _flat(x: Tensor) -> Tensor:
    """[N, B, C, H, W] -> [B, N*C, H, W] in channels-last."""
    return x.permute(1, 3, 4, 0, 2).contiguous().flatten(3).permute(0, 3, 1, 2)


def _unflat(x: Tensor, points: int) -> Tensor:
    return x.unflatten(1, (points, -1)).transpose(0, 1)


def _each(x: Tensor) -> Tensor:
    """[N, B, C, H, W] with every network's images in channels-last, wherever the networks lie."""
    around = x.movedim(2, -1)
    return x if around[0].is_contiguous() else around.contiguous().movedim(-1, 2)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """[N, B, C, H, W], (N, B, H, W, C) in memory."""
    points, batch, channels, height, width = shape
    return like.new_empty((points, batch, height, width, channels)).movedim(-1, 2)


def _by_network(function: Callable[..., None], *tensors: Tensor) -> Tensor:
    """The last tensor, which a call for each network writes its part of; on a GPU from several
    streams if `conv_table.STREAMS` says so."""
    calls = [partial(function, *own) for own in zip(*(t.unbind(0) for t in tensors))]
    target = tensors[-1]
    if conv_table.STREAMS == 1 or not target.is_cuda:
        for call in calls:
            call()
        return target
    now = torch.cuda.current_stream(target.device)
    streams = _streams(target.device, conv_table.STREAMS)
    for stream in streams:
        stream.wait_stream(now)
    for i, call in enumerate(calls):
        with torch.cuda.stream(streams[i % len(streams)]):
            call()
    for stream in streams:
        now.wait_stream(stream)
    return target


@functools.lru_cache(maxsize=None)
def _streams(device: torch.device, number: int) -> List[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(number)]


def _convolve(x: Tensor, weight: Tensor, out: Tensor, stride: int, padding: int) -> None:
    """One network's convolution into `out`, which cuDNN writes itself; others are copied there."""
    cudnn = torch.backends.cudnn
    if not (x.is_cuda and torch.version.hip is None and cudnn.enabled and cudnn.is_available()):
        out.copy_(F.conv2d(x, weight, None, stride, padding))
        return
    repeatable = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    flags = cudnn.benchmark, repeatable, _tf32()
    options = [padding] * 2, [stride] * 2, [1, 1], 1, *flags
    torch.ops.aten.cudnn_convolution.out(x, weight, *options, out=out)


def _tf32() -> bool:
    conv = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made when torch is imported
    return conv.fp32_precision == "tf32"


def _tapped(weight: Tensor) -> Tensor:
    """[N, O, C, KH, KW] -> [N, O, KH, KW, C]."""
    return weight.movedim(2, -1).contiguous()


def _backward(dy, x, weight, stride: int, padding: int, groups: int, which: int) -> Tensor:
    """The gradient of the input (0) or of the weights (1) by PyTorch."""
    return torch.ops.aten.convolution_backward(
        *(dy, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], groups),
        [which == 0, which == 1, False],
    )[which]


# --- The output, [N, B, C, H, W] and [N, O, C, K, K] -> [N, B, O, H', W'] -------------------------


def forward(way: str, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    points, out, _, size, _ = weight.shape
    if way == "grouped":
        y = F.conv2d(_flat(x), weight.flatten(0, 1), None, stride, padding, 1, points)
        return _unflat(y, points)
    if way == "dense":
        return _by_network(
            partial(_convolve, stride=stride, padding=padding),
            *(_each(x), _each(weight)),
            _empty(x, points, x.shape[1], out, *_size(x, size, stride, padding)),
        )
    height, width = _size(x, size, stride, padding)
    x = _innermost(x)
    y = empty_like(x, x.shape[0], height, width, points, out)
    conv_kernels.conv(x, _tapped(weight), y, stride, padding, _tf32(), False)
    return channels_third(y)


def _size(x: Tensor, size: int, stride: int, padding: int) -> List[int]:
    """Height and width of the output."""
    return [(n + 2 * padding - size) // stride + 1 for n in x.shape[3:]]


def _innermost(x: Tensor) -> Tensor:
    """[B, H, W, N, C]; what all networks share is not repeated."""
    if x.stride(0) == 0:
        return channels_innermost(x[:1]).expand(-1, -1, -1, len(x), -1)
    return channels_innermost(x)


# --- Its gradients --------------------------------------------------------------------------------


def input_gradient(
    way: str, dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    """[N, B, C, H, W]."""
    points = len(weight)
    if way == "grouped":
        given = _flat(dy), _flat(x), weight.flatten(0, 1)
        return _unflat(_backward(*given, stride, padding, points, 0), points)
    if way == "dense":
        dx = _empty(dy, points, dy.shape[1], *x.shape[2:])
        size = weight.shape[3]
        if stride == 1 and padding < size:  # a convolution with the taps mirrored
            mirrored = _each(weight.flip(3, 4).transpose(1, 2))
            same = partial(_convolve, stride=1, padding=size - 1 - padding)
            return _by_network(same, _each(dy), mirrored, dx)
        return _by_network(
            lambda dy, x, w, dx: dx.copy_(_backward(dy, x, w, stride, padding, 1, 0)),
            *(_each(dy), x, _each(weight), dx),
        )
    dy = channels_innermost(dy)
    dx = empty_like(dy, x.shape[1], *x.shape[3:], points, x.shape[2])
    conv_kernels.conv(dy, _tapped(weight), dx, stride, padding, _tf32(), True)
    return channels_third(dx)


def weight_gradient(
    way: str, dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    """[N, O, C, K, K]."""
    points = len(weight)
    if way == "grouped":
        given = _flat(dy), _flat(x), weight.flatten(0, 1)
        return _backward(*given, stride, padding, points, 1).unflatten(0, (points, -1))
    if way == "dense":
        return _by_network(
            lambda dy, x, w, dw: dw.copy_(_backward(dy, x, w, stride, padding, 1, 1)),
            *(_each(dy), _each(x), weight, _empty(weight, *weight.shape)),
        )
    dweight = conv_kernels.conv_weight(
        *(_innermost(x), channels_innermost(dy)), weight.shape[3], stride, padding, _tf32()
    )
    return dweight.movedim(-1, 2).to(weight.dtype)


class _StackedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, stride: int, padding: int, ways: Ways) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = ways, stride, padding
        return forward(ways.forward, x, weight, stride, padding)

    @staticmethod
    def backward(ctx, dy):
        (x, weight), (ways, *options) = ctx.saved_tensors, ctx.options
        if torch.is_grad_enabled():  # a gradient of the gradient will be asked for
            return *_differentiable(dy, x, weight, *options), None, None, None
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = input_gradient(ways.input, dy, x, weight, *options)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(ways.weight, dy, x, weight, *options)
        return dx, dweight, None, None, None


def _differentiable(dy: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int):
    y = plain.conv(x, weight, None, stride, padding, 1, 1)
    wanted = [t for t in (x, weight) if t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
    return [next(grads) if t.requires_grad else None for t in (x, weight)]


def conv_by(ways: Ways, x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """A convolution without bias whose three products run in the given ways."""
    return _StackedConv.apply(x, weight, stride, padding, ways)


# --- Public ---------------------------------------------------------------------------------------


def stacked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Union[int, Sequence[int]] = 1,
    padding: Union[int, Sequence[int], str] = 0,
    dilation: Union[int, Sequence[int]] = 1,
    groups: int = 1,
    *,
    impl: str = "auto",
) -> Tensor:
    """N convolutions, one a network, in one operation.

    Equivalent to, in two dimensions::

        torch.stack([F.conv2d(x[i], weight[i], bias[i], ...) for i in range(N)])

    Args:
        x: [N, B, C, ...] with one, two or three spatial axes, or [B, C, ...] inputs shared by all
            networks, which are not repeated: they get one dense convolution with N * O output
            channels. `x.expand(N, *x.shape)` is the same.
        weight: [N, O, C / groups, ...].
        bias: [N, O].
        stride, padding, dilation, groups: of each network, as in `torch.nn.functional.conv2d`.
        impl: "torch" is one convolution with N groups; "triton" an own kernel, for square kernels
            of images, one stride and padding, no dilation or groups; "auto" on a GPU what
            `conv_table.py` has for the shape, or one a network without copies, else "torch".

    Returns:
        [N, B, O, ...], on a GPU with the channels of images innermost in memory. Differentiable;
        what is not impl="torch" knows no torch.func transform and no forward mode.

    Raises:
        ValueError: x or weight with another number of dimensions or networks, an unknown impl.
        RuntimeError: impl="triton" where it cannot run; the message says what is missing.

    Example:
        >>> x, weight = torch.randn(3, 8, 4, 9, 9), torch.randn(3, 6, 4, 3, 3)
        >>> stacked_conv(x, weight, padding=1).shape
        torch.Size([3, 8, 6, 9, 9])
    """
    if x.ndim == weight.ndim - 1:
        x = x.expand(len(weight), *x.shape)
    plain.check_convolution("stacked_conv", x, weight)
    square = _square(weight, stride, padding, dilation, groups)
    if impl == "auto":
        ways = _measured(x, weight, square)
    else:
        unfit = "" if square else "it takes square kernels, one stride and padding, no dilation"
        ways = OWN if use_triton("stacked_conv", impl, x, unfit) else None
    if ways is None or square is None:
        y = plain.conv(x, weight, bias, stride, padding, dilation, groups)
        return _each(y) if _has_networks_apart(x, y) else y
    y = conv_by(ways, x, weight, *square)
    return y if bias is None else y + bias[:, None, :, None, None]


def _measured(x: Tensor, weight: Tensor, square: Optional[Tuple[int, int]]) -> Optional[Ways]:
    """What the table has for a shape on a GPU, else one convolution a network; None, which is plain
    PyTorch, on a CPU, for what all networks share, and under a compiler, who has ways of its own.
    """
    if square is None or not x.is_cuda or x.dtype not in HALF_AND_SINGLE:
        return None
    if x.stride(0) == 0 or torch.compiler.is_compiling():
        return None
    _, out, channels, size, _ = weight.shape
    known = Shape(size, square[0], channels, out, x.shape[3])
    usual = square[1] == size // 2 and x.shape[3] == x.shape[4]
    ways = TABLE.get(known, DENSE) if usual else DENSE
    large = x.numel() // channels * max(channels, out) > plain.MOST_ELEMENTS
    fit = not ("triton" in ways and triton is None) and not ("grouped" in ways and large)
    return ways if fit else DENSE


def _has_networks_apart(x: Tensor, y: Tensor) -> bool:
    """Whether to copy what was computed of shared images to where convolutions of a network each
    read it, once for all that follows: a norm's result and gradients lie as its input does."""
    around = not any("grouped" in ways for ways in TABLE.values())
    return x.is_cuda and x.stride(0) == 0 and y.ndim == 5 and around


def _square(weight: Tensor, stride, padding, dilation, groups: int) -> Optional[Tuple[int, int]]:
    """Stride and padding of a convolution that the own kernel takes; None if it does not."""
    if weight.ndim != 5 or weight.shape[3] != weight.shape[4] or groups != 1:
        return None
    if isinstance(padding, str):
        return None
    pairs = [{n} if isinstance(n, int) else set(n) for n in (stride, padding, dilation)]
    if any(len(pair) != 1 for pair in pairs) or pairs[2] != {1}:
        return None
    return pairs[0].pop(), pairs[1].pop()
