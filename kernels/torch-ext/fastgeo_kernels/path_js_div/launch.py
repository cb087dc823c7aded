"""How a path of logits is cut into programs, and their launch."""

from __future__ import annotations

import functools
import math
from typing import Dict, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..launching import on_device_of, triton
from .options import HALF, SKEW, How
from .pairs import pair_rows_kernel, pair_tiles_kernel
from .rows import path_rows_kernel
from .tiles import path_tiles_kernel


class Blocks(NamedTuple):
    """How a path is cut into programs."""

    rows: int  # of the batch, in a tile
    block: int  # classes in a tile
    segment: int  # points that a program owns; a whole path where it is N
    warps: int
    tiled: bool  # a row is longer than a tile


TRITON_3_6 = triton is not None and triton.__version__.startswith("3.6.")
# Where the offsets of a load say nothing, Triton 3.6 lays neighbouring threads along the first axis
# of a tile and later ones along the last. Short rows are to lie along that one.
ROWS_BEFORE_CLASSES = int(TRITON_3_6)
WHOLE_ROW = 4096  # classes up to which a row is one tile; registers of 16 warps hold it
TILE = 2048


def choose_blocks(
    points: int, batch: int, classes: int, processors: int, kind: int = HALF
) -> Blocks:
    """Block sizes from the shape and the number of multiprocessors (1: never cut the path).

    A thread gets 8 numbers of a tile, 16 where fewer warps then share the sums over a row or it
    holds whole rows, and 4 of a row in tiles, which has more sums to keep (`python -m
    benchmarks.resources` prints the registers this takes). Tiny problems take the whole batch in
    one program, which then also sums it. Where a multiprocessor would get less than 16 warps the
    path is cut; each further piece reads two rows more. The formula of betas other than 1/2, 0 and
    1 has more to keep, and gets more threads for a row.
    """
    block = max(4, 1 << (classes - 1).bit_length())
    tiled = block > (WHOLE_ROW // 2 if kind == SKEW else WHOLE_ROW)
    if tiled:
        rows, block, warps = 1, TILE, 16
    elif batch * block <= 4096:
        rows = 1 << (batch - 1).bit_length()
        warps = max(1, rows * block // 512)
    elif block >= 1024:
        rows, warps = 1, block // (256 if kind == SKEW else 512)
    elif block <= 16:
        rows, warps = 2048 // block, 4
    else:
        rows = max(1, 1024 // block)
        warps = 4
    programs = -(-batch // rows)
    pieces = min(points, max(1, 16 * processors // (programs * warps))) if processors > 1 else 1
    return Blocks(rows, block, -(-points // pieces), warps, tiled)


def launch(
    logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    value: str,
    upstream: Optional[Tensor] = None,
    grad: bool = False,
) -> Tuple[Tensor, Tensor]:
    """One launch over [N, B, C] logits: values and gradient, empty where they are not asked for;
    `value` is "none", "rows", "mean" or "fisher"."""
    points, batch, classes = logits.shape
    blocks = choose_blocks(points, batch, classes, _processors(logits.device), how.kind)
    programs = -(-batch // blocks.rows)
    shape = {"none": (0,), "mean": (programs, points - 1)}.get(value, (points - 1, batch))
    values = logits.new_empty(shape, dtype=torch.float32)
    dlogits = logits.new_empty(logits.shape if grad else (0,))
    pieces = -(-points // blocks.segment)
    carried = (programs * pieces, classes) if grad and points > 2 else (0,)
    carry = [logits.new_empty(carried, dtype=torch.float32)] if blocks.tiled else []
    with on_device_of(logits):
        kernel_for(blocks)[(programs, pieces)](
            logits,
            logits if upstream is None else upstream,
            values,
            dlogits,
            logits if kept is None else kept,
            points,
            batch,
            *logits.stride(),
            *((0, 0) if upstream is None else upstream.stride()),
            *numbers(how),
            *carry,
            **constants(
                points,
                classes,
                blocks,
                aligned=_aligned(logits),
                wide=_wide(logits, blocks.rows),
                kind=how.kind,
                kept=kept is not None,
                value=value,
                grad=grad,
                upstream=upstream is not None,
                mean=value == "mean",
            ),
            **options(blocks, how.kind, torch.version.hip is None, logits.stride(2) == 1),
        )
    if value == "mean":
        values = values[0] if programs == 1 else values.sum(0)
    return values, dlogits


def launch_pair(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    upstream: Optional[Tensor] = None,
    p_grad: Optional[Tensor] = None,
    q_grad: Optional[Tensor] = None,
) -> Tensor:
    """One launch over two [B, C]: the values [B], or with an upstream gradient [B] none but what is
    written to the two gradients, contiguous, where they are given."""
    batch, classes = p_logits.shape
    blocks = choose_blocks(2, batch, classes, 1, how.kind)
    values = p_logits.new_empty((batch if upstream is None else 0,), dtype=torch.float32)
    p_logits, q_logits = (x if x.stride(1) == 1 else x.contiguous() for x in (p_logits, q_logits))
    with on_device_of(p_logits):
        kernel_for(blocks, pair=True)[(-(-batch // blocks.rows),)](
            p_logits,
            q_logits,
            p_logits if kept is None else kept,
            p_logits if upstream is None else upstream,
            values,
            p_logits if p_grad is None else p_grad,
            q_logits if q_grad is None else q_grad,
            batch,
            p_logits.stride(0),
            q_logits.stride(0),
            0 if upstream is None else upstream.stride(0),
            *numbers(how),
            **pair_constants(
                classes,
                blocks,
                aligned=[_divisor(x, x.stride(0)) for x in (p_logits, q_logits)],
                kind=how.kind,
                kept=kept is not None,
                value=upstream is None,
                p_grad=p_grad is not None,
                q_grad=q_grad is not None,
            ),
            **options(blocks, how.kind, nvidia=torch.version.hip is None),
        )
    return values


def pair_constants(
    classes: int,
    blocks: Blocks,
    *,
    aligned: Sequence[int],
    kind: int,
    kept: bool,
    value: bool,
    p_grad: bool,
    q_grad: bool,
) -> Dict[str, object]:
    """The constexpr arguments of a launch over a pair."""
    rows = dict(ROWS=blocks.rows, AXIS=ROWS_BEFORE_CLASSES if blocks.block <= 16 else 1)
    return dict(
        P_ALIGNED=aligned[0],
        Q_ALIGNED=aligned[1],
        C=classes,
        KIND=kind,
        KEPT=kept,
        VALUE=value,
        P_GRAD=p_grad,
        Q_GRAD=q_grad,
        BLOCK=blocks.block,
        **({} if blocks.tiled else rows),
    )


def kernel_for(blocks: Blocks, pair: bool = False):
    if pair:
        return pair_tiles_kernel if blocks.tiled else pair_rows_kernel
    return path_tiles_kernel if blocks.tiled else path_rows_kernel


def options(
    blocks: Blocks, kind: int, nvidia: bool, side_by_side: bool = True
) -> Dict[str, object]:
    """How a launch is compiled. Where a product may be fused with a sum is written out, so that
    the reversed path gives the same bits.

    Args:
        side_by_side: whether the classes of a row are.
    """
    chosen: Dict[str, object] = {"num_warps": blocks.warps, "enable_fp_fusion": False}
    # Or the assembler spills a few registers to fit one more program on a multiprocessor.
    most = {2: 248, 4: 248, 16: 128}.get(blocks.warps)
    if kind != SKEW and blocks.block <= 16 and blocks.warps > 2:
        most = 128
    elif kind != SKEW and blocks.block in (1024, 2048) and side_by_side and not blocks.tiled:
        most = 200  # which one program more on a multiprocessor needs
    if nvidia and most:
        chosen["maxnreg"] = most
    return chosen


def constants(
    points: int,
    classes: int,
    blocks: Blocks,
    *,
    aligned: int,
    wide: bool,
    kind: int,
    kept: bool,
    value: str,
    grad: bool,
    upstream: bool,
    mean: bool,
) -> Dict[str, object]:
    """The constexpr arguments of a launch."""
    whole = blocks.segment >= points
    edges = points - 1 if whole else blocks.segment + 1
    rows = dict(
        EDGES=edges,
        HALO=0 if whole else 1,
        # Without one of the two, or by other formulas, two edges would spill, or gain nothing.
        AT_ONCE=2 if kind == HALF and grad and value != "none" and edges % 2 == 0 else 1,
        ROWS=blocks.rows,
        PIECE=_piece(classes, blocks, aligned),
    )
    return dict(
        ALIGNED=aligned,
        WIDE=wide,
        C=classes,
        KIND=kind,
        KEPT=kept,
        VALUE={"none": 0, "mean": 2}.get(value, 1),
        FISHER=value == "fisher",
        GRAD=grad,
        UPSTREAM=upstream,
        MEAN=mean,
        SEGMENT=blocks.segment,
        **(dict(BLOCK=blocks.block) if blocks.tiled else rows),
    )


def _piece(classes: int, blocks: Blocks, aligned: int) -> int:
    """How many classes of a row lie in a tile: of short rows what a thread reads at once, else four
    numbers for each."""
    if blocks.block <= 16:
        return math.gcd(math.gcd(aligned, classes), 4)
    return min(blocks.block, max(1, 128 * blocks.warps // blocks.rows))


def numbers(how: How) -> Tuple[float, ...]:
    """What the kernels take as arguments, so that a new number compiles nothing."""
    return (1 / how.temperature, *how.shares, *how.limits)


def _aligned(logits: Tensor) -> int:
    """The power of two, 16 bytes at most, that divides the strides of points and rows; the
    compiler itself only sees multiples of 16 elements and would read 1,000 classes one by one."""
    if logits.stride(2) != 1:
        return 1
    return _divisor(logits, *logits.stride()[:2])


def _divisor(logits: Tensor, *strides: int) -> int:
    return math.gcd(16 // logits.element_size(), *strides)


def _wide(logits: Tensor, rows: int) -> bool:
    """A program's rows reach further than a 32-bit offset."""
    _, _, classes = logits.shape
    return rows * logits.stride(1) + classes * logits.stride(2) >= 1 << 31


@functools.lru_cache(maxsize=None)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
