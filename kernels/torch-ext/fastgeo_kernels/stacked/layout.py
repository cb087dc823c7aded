"""Two ways in which images of N networks lie in memory, both with the channels innermost.

(B, ..., N, C) is what a channels-last convolution with N groups reads and writes, (N, B, ..., C)
what N convolutions do. The kernels take either and give what they took.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor


def channels_innermost(x: Tensor, like: Optional[Tensor] = None) -> Tensor:
    """[N, B, C, ...] -> [B, ..., N, C] that lies in one of the two ways; a view where it can be.

    Args:
        like: another such value, whose way is taken. By default (B, ..., N, C), unless x lies in
            the other way.
    """
    around = x.movedim(2, -1)  # [N, B, ..., C]
    within = around.movedim(0, -2)  # [B, ..., N, C]
    if like is not None:
        outside = not like.is_contiguous()
    else:
        outside = around.is_contiguous() and not within.is_contiguous()
    return around.contiguous().movedim(0, -2) if outside else within.contiguous()


def channels_third(x: Tensor) -> Tensor:
    """[B, ..., N, C] -> [N, B, C, ...], a view."""
    return x.movedim(-2, 0).movedim(-1, 2)


def empty_like(x: Tensor, *shape: int) -> Tensor:
    """[B, ..., N, C] that lies as x does, of x's shape or another one."""
    *outer, points, channels = shape or x.shape
    if x.is_contiguous():
        return x.new_empty((*outer, points, channels))
    return x.new_empty((points, *outer, channels)).movedim(0, -2)
