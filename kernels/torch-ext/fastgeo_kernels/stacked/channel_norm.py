"""Kernels of LayerNorm over the channels of each pixel, for N stacked networks.

The formulas, the memory layout and the helpers are those of `group_norm.py`; the statistics are
over the C channels of one network at one pixel (Ba et al., "Layer Normalization", 2016). Every
pixel is read once and written once; the backward pass, which has it at hand, computes its
statistics again, so that nothing but the input is saved.
"""

from __future__ import annotations

from typing import Dict, Optional, Tuple

import torch
from torch import Tensor

from ..launching import jit, on_device_of, power_of_two, tl
from .group_norm import Tile, block_of_program, finish, grid, load, passed, units
from .layout import empty_like

PROGRAMS = 64  # of one network, at most, that share the pixels of a backward pass


# --- Statistics over the channels of a pixel: LayerNorm -------------------------------------------


@jit
def _rows(x_ptr, at, mask, C: tl.constexpr, EPS: tl.constexpr):
    """[PIXELS, CHANNELS] -> (x - mean) rstd, and rstd [PIXELS, 1]."""
    x = load(x_ptr, at, mask, "")
    z = tl.where(mask, x - tl.sum(x, 1, keep_dims=True) / C, 0.0)
    rstd = tl.rsqrt(tl.sum(z * z, 1, keep_dims=True) / C + EPS)
    return z * rstd, rstd


@jit
def channel_forward_kernel(
    x_ptr,  # [R, N, C], as residual and y; R pixels of all images, at (r pixels + n points) C
    residual_ptr,
    weight_ptr,  # [N, C], as bias
    bias_ptr,
    y_ptr,
    N,
    R,
    points,
    pixels,
    C: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some pixels of one network."""
    point, block = tl.program_id(0).to(tl.int64), block_of_program()
    pixel, col = block * PIXELS + tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    mask = (pixel < R)[:, None] & (col < C)[None, :]
    at = (pixel[:, None] * pixels + point * points) * C + col[None, :]
    own = point * C + col
    weight = tl.load(weight_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
    z, _ = _rows(x_ptr, at, mask, C, EPS)
    finish(z, weight, bias, residual_ptr, y_ptr, at, mask, RESIDUAL, RELU, "")


@jit
def channel_backward_kernel(
    x_ptr,  # [R, N, C], as y, dy, dx and dresidual
    y_ptr,
    dy_ptr,
    other_ptr,  # as dy, of another use of y; None if there is none
    weight_ptr,  # [N, C], as bias
    bias_ptr,
    dx_ptr,
    dresidual_ptr,
    dparams_ptr,  # [programs, 2, N, C]
    N,
    R,
    points,
    pixels,
    tiles,
    C: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """`tiles` tiles of pixels of one network; statistics are computed again, x being at hand."""
    point, block = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    col = tl.arange(0, CHANNELS)
    own = point * C + col
    weight = tl.load(weight_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
    dweights = tl.zeros([PIXELS, CHANNELS], tl.float32)
    dbiases = tl.zeros([PIXELS, CHANNELS], tl.float32)
    row = tl.arange(0, PIXELS)
    at = row[:, None] * (pixels * C) + col[None, :]
    for tile in range(tiles):
        start = (block * tiles + tile) * PIXELS
        here = (start * pixels + point * points) * C
        mask = (row < R - start)[:, None] & (col < C)[None, :]
        z, rstd = _rows(x_ptr + here, at, mask, C, EPS)
        g = passed(dy_ptr, other_ptr, y_ptr, here, z, weight, bias, at, mask, RESIDUAL, RELU, "")
        if RESIDUAL and RELU:
            tl.store(dresidual_ptr + here + at, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dweights += g * z
        dbiases += g
        g *= weight
        shift = tl.sum(g, 1, keep_dims=True) / C
        slope = tl.sum(g * z, 1, keep_dims=True) / C
        dx = rstd * (g - shift - z * slope)
        tl.store(dx_ptr + here + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    dparams_ptr += block * 2 * N * C + own
    tl.store(dparams_ptr, tl.sum(dweights, 0), mask=col < C)
    tl.store(dparams_ptr + N * C, tl.sum(dbiases, 0), mask=col < C)


# --- Launchers


def channel_tile(channels: int) -> Tile:
    """The tile of pixels of `channels` channels."""
    channels = power_of_two(channels)
    pixels = max(1, (2048 if channels > 16 else 1024) // channels)
    return Tile(pixels, channels, min(16, max(4, pixels * channels // 512)), True)


def channel_forward(
    x: Tensor, residual: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tensor:
    """y as x."""
    batch, pixels, points, channels = x.shape
    tile, rows, y = channel_tile(channels), batch * pixels, empty_like(x)
    with on_device_of(x):
        channel_forward_kernel[grid(points, -(-rows // tile.pixels))](
            *(x, x if residual is None else residual, weight, bias, y),
            *(points, rows, *units(x)[::2]),
            **channel_constants(channels, tile, residual is not None, relu, eps),
            num_warps=tile.warps,
        )
    return y


def channel_backward(
    x: Tensor,
    y: Optional[Tensor],
    dy: Tensor,
    other: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    relu: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """As `group_backward`."""
    batch, pixels, points, channels = x.shape
    tile, rows = channel_tile(channels), batch * pixels
    tiles = -(-rows // tile.pixels)
    each = -(-tiles // PROGRAMS)
    programs = -(-tiles // each)
    dx = empty_like(x)
    dresidual = dy if y is None else empty_like(x)
    dparams = x.new_empty((programs, 2, points, channels), dtype=torch.float32)
    with on_device_of(x):
        channel_backward_kernel[(points, programs)](
            *(x, x if y is None else y, dy, other, weight, bias, dx, dresidual, dparams),
            *(points, rows, *units(x)[::2], each),
            **channel_constants(channels, tile, y is not None, relu, eps),
            num_warps=tile.warps,
        )
    return dx, dresidual, dparams.sum(0)


def channel_constants(
    channels: int, tile: Tile, residual: bool, relu: bool, eps: Optional[float]
) -> Dict[str, object]:
    """The constexpr arguments of a launch."""
    return dict(
        C=channels,
        EPS=eps,
        RESIDUAL=residual,
        RELU=relu,
        PIXELS=tile.pixels,
        CHANNELS=tile.channels,
    )
