"""Convolutions of N stacked networks as implicit matrix products, one network and tile a program.

For every tap of the kernel a tile of pixels, shifted by the tap, times that tap's weights: nothing
is unfolded in memory. Taps and channels are one loop, so that loads run ahead of products over all
of it. The gradient of the input is the same sum with the taps mirrored and the weights transposed;
that of the weights multiplies inputs, of which a tile holds the channels of several taps, with the
output gradients, over slices of the batch which are added up in a fixed order.

A value is [B, H, W, N, C] by its address (b batch + pixel pixels + n points) C + c, which covers
(B, H, W, N, C) and (N, B, H, W, C) in memory and, with points = 0, an input that all networks
share. Weights are (N, O, taps, C) in memory, channels-last. Programs have four warps: a loop over
taps and channels has been miscompiled with eight (pytorch/pytorch#177823, triton-lang/triton#1254),
and so have, on Blackwell, several products into one accumulator inside a loop
(triton-lang/triton#10821), hence one product a loop here.
"""

from __future__ import annotations

import os
from typing import Dict, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from ..launching import jit, on_device_of, power_of_two, tl

if tl is not None:
    # The interpreter takes bf16 for its bit pattern in a product.
    INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

WARPS = 4
PROGRAMS = 1024  # of the weights' gradient, above which the batch is not cut


class Blocks(NamedTuple):
    """Tiles of a product: rows, columns, and what is summed at a time."""

    rows: int
    columns: int
    inner: int
    stages: int


@jit
def _product(a, b, total, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@jit
def conv_kernel(
    x_ptr,  # the source: [B, H, W, N, C]
    weight_ptr,  # [N, O, taps, C]; MIRRORED: [N, C, taps, O]
    y_ptr,  # the target: [B, OH, OW, N, O]
    rows,  # B * OH * OW
    rounds,  # taps times pieces of INNER channels; not a constant, or few are unrolled and spill
    x_points,
    x_batch,
    x_pixels,
    y_points,
    y_batch,
    y_pixels,
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    MIRRORED: tl.constexpr,  # the gradient of the input: the source is that of the output
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS pixels by COLUMNS channels of one network."""
    tiles: tl.constexpr = (O + COLUMNS - 1) // COLUMNS
    start = (tl.program_id(0) // tiles) * ROWS
    column = (tl.program_id(0) % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    point = tl.program_id(1).to(tl.int64)
    inner = tl.arange(0, INNER)
    row = start + tl.arange(0, ROWS)
    first = start // (OH * OW)  # image; offsets from it have 32 bits
    image = row // (OH * OW) - first
    pixel = row % (OH * OW)
    x_ptr += (first.to(tl.int64) * x_batch + point * x_points) * C
    y_ptr += (first.to(tl.int64) * y_batch + point * y_points) * O
    weight_ptr += point * (O * SIZE * SIZE * C)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    pieces: tl.constexpr = (C + INNER - 1) // INNER
    for i in range(rounds):
        tap = i // pieces
        channel = i % pieces * INNER + inner
        if MIRRORED:
            down = pixel // OW + PADDING - tap // SIZE
            across = pixel % OW + PADDING - tap % SIZE
            inside = (down % STRIDE == 0) & (across % STRIDE == 0) & (down >= 0) & (across >= 0)
            down //= STRIDE
            across //= STRIDE
            inside &= (down < H) & (across < W)
            weights = (channel[:, None] * (SIZE * SIZE) + tap) * O + column[None, :]
        else:
            down = pixel // OW * STRIDE - PADDING + tap // SIZE
            across = pixel % OW * STRIDE - PADDING + tap % SIZE
            inside = (down >= 0) & (down < H) & (across >= 0) & (across < W)
            weights = (column[None, :] * (SIZE * SIZE) + tap) * C + channel[:, None]
        at = (image * x_batch + (down * W + across) * x_pixels) * C
        a = tl.load(
            x_ptr + at[:, None] + channel[None, :],
            mask=(inside & (row < rows))[:, None] & (channel < C)[None, :],
            other=0.0,
        )
        b = tl.load(
            weight_ptr + weights,
            mask=(channel < C)[:, None] & (column < O)[None, :],
            other=0.0,
        )
        total = _product(a, b, total, PRECISION)
    at = (image * y_batch + pixel * y_pixels) * O
    mask = (row < rows)[:, None] & (column < O)[None, :]
    tl.store(y_ptr + at[:, None] + column[None, :], total.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def conv_weight_kernel(
    x_ptr,  # [B, H, W, N, C]
    dy_ptr,  # [B, OH, OW, N, O]
    dweight_ptr,  # [slices, N, O, taps, C]
    rows,  # B * OH * OW
    x_points,
    x_batch,
    x_pixels,
    y_points,
    y_batch,
    y_pixels,
    tiles,  # of INNER pixels, a slice
    H: tl.constexpr,
    W: tl.constexpr,
    OH: tl.constexpr,
    OW: tl.constexpr,
    C: tl.constexpr,
    O: tl.constexpr,  # noqa: E741
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS input channels of taps by COLUMNS output channels of a network, over a slice of pixels.

    All taps' input channels lie in one row, so that a tile of dy serves several taps.
    """
    across_tiles: tl.constexpr = (O + COLUMNS - 1) // COLUMNS
    row = (tl.program_id(0) // across_tiles) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    point, part = tl.program_id(1).to(tl.int64), tl.program_id(2)
    x_ptr += point * x_points * C
    dy_ptr += point * y_points * O
    tap, channel = row // C, row % C
    tap_down, tap_across = tap // SIZE, tap % SIZE
    row_ok = row < SIZE * SIZE * C
    behind = (tap_down * W + tap_across) * x_pixels * C + channel
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in range(tiles):
        place = (part * tiles + i) * INNER + tl.arange(0, INNER)
        image = (place // (OH * OW)).to(tl.int64)
        pixel = place % (OH * OW)
        down = pixel // OW * STRIDE - PADDING
        across = pixel % OW * STRIDE - PADDING
        place_ok = place < rows
        at = (image * y_batch + pixel * y_pixels) * O
        dy = tl.load(
            dy_ptr + at[:, None] + column[None, :],
            mask=place_ok[:, None] & (column < O)[None, :],
            other=0.0,
        )
        at = (image * x_batch + (down * W + across) * x_pixels) * C
        down = down[:, None] + tap_down[None, :]
        across = across[:, None] + tap_across[None, :]
        inside = (down >= 0) & (down < H) & (across >= 0) & (across < W)
        inside &= place_ok[:, None] & row_ok[None, :]
        x = tl.load(x_ptr + at[:, None] + behind[None, :], mask=inside, other=0.0)
        total = _product(tl.trans(x), dy, total, PRECISION)
    dweight_ptr += ((part * tl.num_programs(1) + point) * O * SIZE * SIZE) * C
    at = column[None, :] * (SIZE * SIZE * C) + row[:, None]
    tl.store(dweight_ptr + at, total, mask=row_ok[:, None] & (column < O)[None, :])


# --- Launchers: x [B, H, W, N, C], weight [N, O, KH, KW, C], dy [B, OH, OW, N, O] -----------------


def units(x: Tensor) -> Tuple[int, int, int]:
    """Strides of points, images and pixels of [B, H, W, N, C], in channels."""
    batch, _, _, points, channels = x.shape

    def unit(size: int, stride: int) -> int:
        return 0 if size == 1 or stride == 0 else stride // channels

    pixel = x.stride(2) if x.shape[2] > 1 else x.stride(1)
    return (
        unit(points, x.stride(3)),
        unit(batch, x.stride(0)),
        unit(x.shape[1] * x.shape[2], pixel),
    )


def conv_blocks(columns: int, inner: int, bytes_each: int, precise: bool) -> Blocks:
    """Tiles that spill on no chip (`python -m benchmarks.resources`)."""
    if precise:
        return Blocks(64, _side(32, columns), _side(16, inner), 2)
    return Blocks(128, _side(64, columns), _side(128 // bytes_each, inner), 3)


def weight_blocks(columns: int, rows: int, bytes_each: int, precise: bool) -> Blocks:
    """The same, of so many output channels, and input channels of all taps."""
    if precise:
        return Blocks(_side(32, rows), _side(32, columns), 16, 2)
    return Blocks(_side(128, rows), _side(64, columns), 128 // bytes_each, 3)


def _side(most: int, needed: int) -> int:
    return min(most, max(16, power_of_two(needed)))


def conv(
    x: Tensor, weight: Tensor, y: Tensor, stride: int, padding: int, tf32: bool, mirrored: bool
) -> None:
    """Writes y; mirrored: x is the gradient of the output, and y that of the input."""
    batch, height, width, points, channels = x.shape
    out, size = y.shape[-1], weight.shape[2]
    precise = x.dtype == torch.float32 and not tf32
    blocks = conv_blocks(out, channels, x.element_size(), precise)
    rows = batch * y.shape[1] * y.shape[2]
    rounds = size * size * -(-channels // blocks.inner)
    grid = -(-rows // blocks.rows) * -(-out // blocks.columns), points
    images = 2 + blocks.rows // (y.shape[1] * y.shape[2])  # that a tile may reach into
    if max(_reach(tensor, images) for tensor in (x, y)) >= 2**31:
        raise ValueError(
            f"stacked_conv in Triton has offsets of 32 bits: images {list(x.shape[1:])} to "
            f"{list(y.shape[1:])} are too large; impl='torch' takes them"
        )
    with on_device_of(x):
        conv_kernel[grid](
            *(x, weight, y, rows, rounds, *units(x), *units(y)),
            **constants((height, width), y.shape[1:3], channels, out, size, stride, padding),
            MIRRORED=mirrored,
            PRECISION="ieee" if precise else "tf32",
            **tile(blocks),
            **options(blocks, nvidia=torch.version.hip is None),
        )


def _reach(x: Tensor, images: int) -> int:
    """Offset behind so many images [B, H, W, N, C] from the start of the first one."""
    images = min(len(x), images)
    return images * x.stride(0) if images > 1 else x.shape[1] * x.stride(1)


def conv_weight(x: Tensor, dy: Tensor, size: int, stride: int, padding: int, tf32: bool) -> Tensor:
    """The gradient of the weights, [N, O, KH, KW, C] fp32."""
    batch, height, width, _, channels = x.shape
    out_height, out_width, points, out = dy.shape[1:]
    precise = x.dtype == torch.float32 and not tf32
    inputs = size * size * channels
    blocks = weight_blocks(out, inputs, x.element_size(), precise)
    rows = batch * out_height * out_width
    tiles = -(-inputs // blocks.rows) * -(-out // blocks.columns)
    steps = -(-rows // blocks.inner)
    each = -(-steps // max(1, min(steps, PROGRAMS // (tiles * points))))
    slices = -(-steps // each)
    dweight = x.new_empty((slices, points, out, size, size, channels), dtype=torch.float32)
    with on_device_of(x):
        conv_weight_kernel[(tiles, points, slices)](
            *(x, dy, dweight, rows, *units(x), *units(dy), each),
            **constants((height, width), dy.shape[1:3], channels, out, size, stride, padding),
            PRECISION="ieee" if precise else "tf32",
            **tile(blocks),
            **options(blocks, nvidia=torch.version.hip is None),
        )
    return dweight[0] if slices == 1 else dweight.sum(0)


def constants(
    source: Sequence[int],
    target: Sequence[int],
    channels: int,
    out: int,
    size: int,
    stride: int,
    padding: int,
) -> Dict[str, object]:
    """The constexpr arguments that both kernels take."""
    return dict(
        H=source[0],
        W=source[1],
        OH=target[0],
        OW=target[1],
        C=channels,
        O=out,
        SIZE=size,
        STRIDE=stride,
        PADDING=padding,
    )


def tile(blocks: Blocks) -> Dict[str, int]:
    return dict(ROWS=blocks.rows, COLUMNS=blocks.columns, INNER=blocks.inner)


def options(blocks: Blocks, nvidia: bool) -> Dict[str, int]:
    chosen = dict(num_warps=WARPS, num_stages=blocks.stages)
    # Or the assembler spills a few registers to fit one more program.
    return {**chosen, "maxnreg": 255} if nvidia else chosen
