"""Kernels of GroupNorm with one group for N stacked networks, a residual sum and ReLU behind it.

A value is [B, S, N, C], S pixels, with element c at (b batch + s pixels + n points) C + c: the C
channels of a network lie side by side, the networks within a pixel or around all (`layout.py`).
With z = (x - mean) rstd over the C channels and S pixels of a network and image (Wu and He, "Group
Normalization", 2018), w the weight and g the gradient that comes back (0 where ReLU cut off):

    y  = relu(z w + bias + residual)
    dx = rstd (g w - mean(g w) - z mean(g w z)),   dw = sum g z,   dbias = sum g

Statistics are in fp32 and never the difference of two squares: of centred values, or by Welford's
update. The two means of dx are sums over channels, of dbias w and of dw w.

A group that fits into the registers of a program is read once and written once. A larger one is
read twice, the second time backwards, from what was read last, and from the L2 cache, which is told
to keep what the first pass reads and to give up what the second one has read: a program has 128 KB
to 384 KB in flight (64 channels of 32x32 pixels in bf16, forward or backward). What the backward
pass needs is x, mean, rstd and, where a residual was added, y for its sign; the gradient that ReLU
let through, which is the residual's, is then read again in place of dy and y. Where y had two uses,
their gradients are summed here. Parameter gradients are summed by program, then over programs in a
fixed order: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..launching import jit, on_device_of, power_of_two, tl
from .layout import empty_like


class Tile(NamedTuple):
    """How a program cuts its pixels."""

    pixels: int
    channels: int
    warps: int
    whole: bool  # a group is one tile


# What registers of 16 warps hold of a group without spilling (`python -m benchmarks.resources`).
WHOLE_FORWARD = 65536  # bytes
WHOLE_BACKWARD = 16384  # numbers


@jit
def load(pointer, at, mask, CACHE: tl.constexpr):
    """CACHE is what the L2 cache is told: evict_last, evict_first, or nothing."""
    return tl.load(pointer + at, mask=mask, other=0.0, eviction_policy=CACHE).to(tl.float32)


@jit
def finish(
    z,
    weight,
    bias,
    residual_ptr,
    y_ptr,
    at,
    mask,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Writes relu(z w + bias + residual)."""
    y = z * weight + bias
    if RESIDUAL:
        y += load(residual_ptr, at, mask, CACHE)
    if RELU:
        y = tl.where(y < 0.0, 0.0, y)  # a NaN stays one
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def passed(
    dy_ptr,
    other_ptr,
    y_ptr,
    start,
    z,
    weight,
    bias,
    at,
    mask,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    CACHE: tl.constexpr,
):
    """The gradient that ReLU lets through; without a residual its input is computed again."""
    g = load(dy_ptr + start, at, mask, CACHE)
    if other_ptr is not None:
        g += load(other_ptr + start, at, mask, CACHE)
    if RELU:
        if RESIDUAL:
            y = load(y_ptr + start, at, mask, CACHE)
        else:
            y = z * weight + bias
        g = tl.where(y <= 0.0, 0.0, g)
    return g


@jit
def block_of_program():
    """The number of a program's block, along the two last axes of `grid`."""
    return tl.program_id(1).to(tl.int64) + tl.program_id(2).to(tl.int64) * 65535


# --- Statistics over the channels and pixels of an image: GroupNorm with one group ----------------


@jit
def group_forward_kernel(
    x_ptr,  # [B, S, N, C], as residual and y
    residual_ptr,
    weight_ptr,  # [N, C], as bias
    bias_ptr,
    y_ptr,
    mean_ptr,  # [B, N], as rstd
    rstd_ptr,
    B,
    N,
    points,
    batch,
    pixels,
    S: tl.constexpr,
    C: tl.constexpr,
    EPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One network and one image."""
    point, image = tl.program_id(0).to(tl.int64), tl.minimum(block_of_program(), B - 1)
    start = (image * batch + point * points) * C
    x_ptr += start
    y_ptr += start
    residual_ptr += start
    pixel, col = tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    at = pixel[:, None] * (pixels * C) + col[None, :]
    col_ok = (col < C)[None, :]
    own = point * C + col
    if WHOLE:
        mask = (pixel < S)[:, None] & col_ok
        x = load(x_ptr, at, mask, "")
        mean = tl.sum(tl.sum(x, 0), 0) / (S * C)
        z = tl.where(mask, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(tl.sum(z * z, 0), 0) / (S * C) + EPS)
        weight = tl.load(weight_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
        finish(z * rstd, weight, bias, residual_ptr, y_ptr, at, mask, RESIDUAL, RELU, "")
    else:
        # Welford's update in every lane, the lanes merged at the end (Chan et al., 1983).
        count = tl.zeros([PIXELS, 1], tl.float32)
        means = tl.zeros([PIXELS, CHANNELS], tl.float32)
        squares = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for first in range(0, S, PIXELS):
            row_ok = (first + pixel < S)[:, None]
            mask = row_ok & col_ok
            x = load(x_ptr + tl.cast(first, tl.int64) * pixels * C, at, mask, "evict_last")
            count += row_ok.to(tl.float32)
            away = tl.where(mask, x - means, 0.0)
            means += away / tl.maximum(count, 1.0)
            squares += away * tl.where(mask, x - means, 0.0)
        mean = tl.sum(tl.sum(means * count, 0), 0) / (S * C)
        away = tl.where(col_ok, means - mean, 0.0)
        squares += count * away * away
        rstd = tl.rsqrt(tl.sum(tl.sum(squares, 0), 0) / (S * C) + EPS)
        weight = tl.load(weight_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
        for back in range(0, S, PIXELS):
            first = (S - 1) // PIXELS * PIXELS - back
            mask = (first + pixel < S)[:, None] & col_ok
            here = at + tl.cast(first, tl.int64) * pixels * C
            z = (load(x_ptr, here, mask, "evict_first") - mean) * rstd
            finish(z, weight, bias, residual_ptr, y_ptr, here, mask, RESIDUAL, RELU, "evict_first")
    tl.store(mean_ptr + image * N + point, mean)
    tl.store(rstd_ptr + image * N + point, rstd)


@jit
def group_backward_kernel(
    x_ptr,  # [B, S, N, C], as y, dy, dx and dresidual
    y_ptr,
    dy_ptr,
    other_ptr,  # as dy, of another use of y; None if there is none
    weight_ptr,  # [N, C], as bias
    bias_ptr,
    mean_ptr,  # [B, N], as rstd
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dparams_ptr,  # [B, 2, N, C]: dweight and dbias of each image
    B,
    N,
    points,
    batch,
    pixels,
    S: tl.constexpr,
    C: tl.constexpr,
    RESIDUAL: tl.constexpr,  # the gradient of the residual is wanted, or y needed for its sign
    RELU: tl.constexpr,
    WHOLE: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One network and one image."""
    point, image = tl.program_id(0).to(tl.int64), tl.minimum(block_of_program(), B - 1)
    start = (image * batch + point * points) * C
    x_ptr += start
    dx_ptr += start
    dresidual_ptr += start
    pixel, col = tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    at = pixel[:, None] * (pixels * C) + col[None, :]
    col_ok = (col < C)[None, :]
    own = point * C + col
    weight = tl.load(weight_ptr + own, mask=col < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + own, mask=col < C, other=0.0).to(tl.float32)[None, :]
    mean = tl.load(mean_ptr + image * N + point)
    rstd = tl.load(rstd_ptr + image * N + point)
    dparams_ptr += image * 2 * N * C + own
    if WHOLE:
        mask = (pixel < S)[:, None] & col_ok
        z = (load(x_ptr, at, mask, "") - mean) * rstd
        w = weight[None, :]
        g = passed(dy_ptr, other_ptr, y_ptr, start, z, w, bias, at, mask, RESIDUAL, RELU, "")
        if RESIDUAL and RELU:
            tl.store(dresidual_ptr + at, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dweight, dbias = tl.sum(g * z, 0), tl.sum(g, 0)
        slope, shift = tl.sum(dweight * weight, 0) / (S * C), tl.sum(dbias * weight, 0) / (S * C)
        dx = rstd * (g * weight[None, :] - shift - z * slope)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        # Once the residual's gradient is stored, dy and y are not read again.
        keep: tl.constexpr = "evict_first" if RESIDUAL and RELU else "evict_last"
        dweights = tl.zeros([PIXELS, CHANNELS], tl.float32)
        dbiases = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for first in range(0, S, PIXELS):
            mask = (first + pixel < S)[:, None] & col_ok
            here = at + tl.cast(first, tl.int64) * pixels * C
            z = (load(x_ptr, here, mask, "evict_last") - mean) * rstd
            w = weight[None, :]
            given = dy_ptr, other_ptr, y_ptr, start, z, w, bias, here, mask
            g = passed(*given, RESIDUAL, RELU, keep)
            if RESIDUAL and RELU:
                tl.store(dresidual_ptr + here, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
            dweights += g * z
            dbiases += g
        tl.debug_barrier()  # what one thread stored of the residual's gradient another may load
        dweight, dbias = tl.sum(dweights, 0), tl.sum(dbiases, 0)
        slope, shift = tl.sum(dweight * weight, 0) / (S * C), tl.sum(dbias * weight, 0) / (S * C)
        for back in range(0, S, PIXELS):
            first = (S - 1) // PIXELS * PIXELS - back
            mask = (first + pixel < S)[:, None] & col_ok
            here = at + tl.cast(first, tl.int64) * pixels * C
            z = (load(x_ptr, here, mask, "evict_first") - mean) * rstd
            w = weight[None, :]
            if RESIDUAL and RELU:
                g = load(dresidual_ptr, here, mask, "evict_first")
            else:
                given = dy_ptr, other_ptr, y_ptr, start, z, w, bias, here, mask
                g = passed(*given, RESIDUAL, RELU, "evict_first")
            dx = rstd * (g * weight[None, :] - shift - z * slope)
            tl.store(dx_ptr + here, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dparams_ptr, dweight, mask=col < C)
    tl.store(dparams_ptr + N * C, dbias, mask=col < C)


# --- Launchers: x, residual, y and dy are [B, S, N, C] of one layout ------------------------------


def grid(points: int, blocks: int) -> Tuple[int, int, int]:
    """Programs of every network and block: no axis but the first takes more than 65,535. Some may
    have a number beyond the last block."""
    return points, min(blocks, 65535), -(-blocks // 65535)


def units(x: Tensor) -> Tuple[int, int, int]:
    """Strides of points, images and pixels of [B, S, N, C], in channels."""
    points, images, pixels = (x.stride(axis) // x.shape[3] for axis in (2, 0, 1))
    return points, images, pixels


def group_tile(pixels: int, channels: int, backward: bool, bytes_each: int) -> Tile:
    """The tile of a group of pixels * channels numbers."""
    pixels, channels = power_of_two(pixels), power_of_two(channels)
    size = pixels * channels
    if size <= WHOLE_BACKWARD if backward else size * bytes_each <= WHOLE_FORWARD:
        return Tile(pixels, channels, min(16, max(1, size // 1024)), True)
    pixels = max(1, min(pixels, 4096 // channels))
    return Tile(pixels, channels, 8, False)


def group_forward(
    x: Tensor, residual: Optional[Tensor], weight: Tensor, bias: Tensor, eps: float, relu: bool
) -> Tuple[Tensor, Tensor, Tensor]:
    """y as x, mean and rstd [B, N]."""
    batch, pixels, points, channels = x.shape
    tile = group_tile(pixels, channels, False, x.element_size())
    y = empty_like(x)
    mean, rstd = (x.new_empty((batch, points), dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        group_forward_kernel[grid(points, batch)](
            *(x, x if residual is None else residual, weight, bias, y, mean, rstd),
            *(batch, points, *units(x)),
            **group_constants(pixels, channels, tile, residual is not None, relu, eps),
            num_warps=tile.warps,
        )
    return y, mean, rstd


def group_backward(
    x: Tensor,
    y: Optional[Tensor],
    dy: Tensor,
    other: Optional[Tensor],
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """dx and dresidual as x (the latter dy itself without a ReLU), dparams [2, N, C].

    Args:
        other: the gradient of another use of y, which is added to dy.
        y: what the forward pass gave, where it added a residual and rectified; else None.
    """
    batch, pixels, points, channels = x.shape
    tile = group_tile(pixels, channels, True, x.element_size())
    dx = empty_like(x)
    dresidual = dy if y is None else empty_like(x)
    dparams = x.new_empty((batch, 2, points, channels), dtype=torch.float32)
    with on_device_of(x):
        group_backward_kernel[grid(points, batch)](
            *(x, x if y is None else y, dy, other, weight, bias, mean, rstd),
            *(dx, dresidual, dparams),
            *(batch, points, *units(x)),
            **group_constants(pixels, channels, tile, y is not None, relu),
            num_warps=tile.warps,
        )
    return dx, dresidual, dparams.sum(0)


def group_constants(
    pixels: int, channels: int, tile: Tile, residual: bool, relu: bool, eps: Optional[float] = None
) -> Dict[str, object]:
    """The constexpr arguments of a launch; the backward kernel takes no eps."""
    constants: Dict[str, object] = dict(
        S=pixels,
        C=channels,
        RESIDUAL=residual,
        RELU=relu,
        WHOLE=tile.whole,
        PIXELS=tile.pixels,
        CHANNELS=tile.channels,
    )
    return constants if eps is None else {**constants, "EPS": eps}
