"""Divergence between neighbouring rows of a path of logits, and its gradient, in one launch.

With p = softmax(x / T), q = softmax(y / T), m = (p + q) / 2 and d = log p - log q, the value is
1/4 sum (p + q) h and the gradient 1/2 p (log(p / m) - KL(p || m)) / T; the formula and its source
stand in `reference.py`. Four things keep fp32 enough:

* d is the difference of the logits, with its rounding error added back, then of the two rows'
  log-sum-exps. What those two still round shifts a whole row of d: the gradient does not feel such
  a shift, and from the value its square, (sum p - sum q)^2 / 8, is taken off.
* For |d| < 1 polynomials give log cosh(d / 2) and tanh(d / 2): the closed forms cancel there.
* Where most of p and of q is on classes that the other lacks, every log(p / m) that counts is
  near log 2. The gradient stays as it is without that constant, and only then keeps its digits.
* A class with more than half of a row takes the gradient that makes the row sum to 0: its own
  closed form is the difference of two nearly equal numbers.

A program walks along the path and holds the row it came from in registers, so that logits are read
once and gradients written once. A row that does not fit is swept in tiles: log-sum-exp, sums,
gradient. Nothing is added atomically: results repeat bit for bit.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Dict, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

if triton is None:
    jit = kernel = lambda function: function
else:
    jit = triton.jit
    # Numbers that change from call to call neither recompile nor turn into constants.
    kernel = triton.jit(
        do_not_specialize=["N", "B", "stride_n", "stride_b", "stride_ue", "stride_ub"]
    )


# --- Kernels: N path points, E = N - 1 edges, B batch, C classes ----------------------------------


@jit
def _load(pointers, mask, floor):
    """Logits as fp32. Masked classes (-inf) and the tile's padding become finite, so that every
    difference of two of them is; `floor` is lower in the padding, which then never counts."""
    x = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)
    return tl.where(x < floor, floor, x)


@jit
def _exp(x):
    """exp as one hardware instruction; below 1e-38 it is 0."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _softmax(x, INV_T: tl.constexpr):
    """[ROWS, BLOCK] -> the largest logit, log sum exp(x / T) without it, and p."""
    top = tl.max(x, 1, keep_dims=True)
    e = _exp((x - top) * INV_T)
    total = tl.sum(e, 1, keep_dims=True)
    return top, tl.log(total), e * (1.0 / total)


@jit
def _exact_difference(x, y):
    """x - y, and the rounding error of it (Knuth's two-sum)."""
    diff = x - y
    y_seen = x - diff
    return diff, (x - (diff + y_seen)) + (y_seen - y)


@jit
def _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T: tl.constexpr):
    """d = log p - log q."""
    diff, lost = _exact_difference(x, y)
    top_diff, top_lost = _exact_difference(x_top, y_top)
    return ((diff - top_diff) + lost) * INV_T - ((x_lse - y_lse) + top_lost * INV_T)


@jit
def _terms(d, p, q):
    """log(max(p, q) / m), the same less log 2, (p + q) h / 2 and p - q, none by cancellation."""
    a = tl.abs(d)
    near = a < 1.0
    u = d * d
    tanh = tl.fma(u, 3.34668094e-05, -4.13953712e-04)
    tanh = tl.fma(u, tanh, 4.16399354e-03)
    tanh = tl.fma(u, tanh, -4.16663367e-02)
    tanh = tl.fma(u, tanh, 4.99999993e-01) * d  # tanh(d / 2)
    log_cosh = tl.fma(u, 1.74241695e-06, -2.60234042e-05)
    log_cosh = tl.fma(u, log_cosh, 3.47107716e-04)
    log_cosh = tl.fma(u, log_cosh, -5.20831922e-03)
    log_cosh = tl.fma(u, log_cosh, 0.125) * u  # log cosh(d / 2)
    e = _exp(-a)
    log1p = tl.fma(e, 5.26536976e-02, -1.30238778e-01)
    log1p = tl.fma(e, log1p, 1.91842718e-01)
    log1p = tl.fma(e, log1p, -2.49017146e-01)
    log1p = tl.fma(e, log1p, 3.33275586e-01)
    log1p = tl.fma(e, log1p, -4.99998710e-01)
    log1p = tl.fma(e, log1p, 9.99999995e-01)  # log(1 + e) / e
    larger = tl.where(near, tl.fma(a, 0.5, -log_cosh), tl.fma(-e, log1p, 0.6931471805599453))
    below = tl.where(near, larger - 0.6931471805599453, -e * log1p)
    log_p = larger + tl.minimum(d, 0.0)
    log_q = larger - tl.maximum(d, 0.0)
    h = tl.where(near, (p + q) * tl.fma(0.5 * d, tanh, -log_cosh), p * log_p + q * log_q)
    return larger, below, h, tl.where(near, (p + q) * tanh, p - q)


@jit
def _alone(d, p, q):
    """p, or q, on classes that the other lacks; above 1 in sum, log(p / m) goes less log 2."""
    return tl.where(d >= 1.0, p, tl.where(d <= -1.0, q, 0.0))


@jit
def _hellinger_term(d, p, q):
    """(sqrt p - sqrt q)^2 = max(p, q) (1 - exp(-|d| / 2))^2."""
    z = 0.5 * tl.abs(d)
    near = tl.fma(z, -1.12163484e-03, 8.1873859e-03)
    near = tl.fma(z, near, -4.16290891e-02)
    near = tl.fma(z, near, 1.66662241e-01)
    near = tl.fma(z, near, -4.99999807e-01)
    near = tl.fma(z, near, 9.99999999e-01) * z
    root = tl.where(z < 0.5, near, 1.0 - _exp(-z))
    return tl.maximum(p, q) * root * root


@jit
def _finish_value(total, gap, FISHER: tl.constexpr):
    """Takes off the square of the row's shift; selects instead of max, which would hide a NaN."""
    gap = 0.5 * gap
    value = total - gap * gap
    if not FISHER:
        value = tl.where(value > 1.3862943611198906, 1.3862943611198906, value) * 0.5
    return tl.where(value < 0.0, 0.0, value)


@jit
def _close_row(grad, p):
    """Gives the class that holds more than half of the row what makes the row sum to 0."""
    leads = p > 0.5
    rest = tl.sum(tl.where(leads, 0.0, grad), 1, keep_dims=True)
    return tl.where(leads, -rest, grad)


@kernel
def _path_rows_kernel(
    logits_ptr,  # [N, B, C]
    upstream_ptr,  # [E, B]
    value_ptr,  # [E, B], or [blocks of rows, E]
    grad_ptr,  # [N, B, C], contiguous
    N,
    B,
    stride_n,
    stride_b,
    stride_c,
    stride_ue,
    stride_ub,
    ALIGNED: tl.constexpr,  # divides stride_n and stride_b
    WIDE: tl.constexpr,  # offsets within a program's rows need 64 bits
    C: tl.constexpr,
    INV_T: tl.constexpr,
    VALUE: tl.constexpr,  # 0: none, 1: a row each, 2: the block's share of the batch mean
    FISHER: tl.constexpr,
    GRAD: tl.constexpr,
    UPSTREAM: tl.constexpr,  # weight of every edge and row; 1 without it
    MEAN: tl.constexpr,  # gradient of the batch mean
    EDGES: tl.constexpr,  # edges that a program walks
    SEGMENT: tl.constexpr,  # points that a program owns
    HALO: tl.constexpr,  # 1 where it begins one edge before its first point
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows that fit a tile: [ROWS, BLOCK] of each point at a time."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(1) * SEGMENT - HALO
    local = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    row = start + local
    row_ok = row < B
    mask = row_ok[:, None] & (col < C)[None, :]
    floor = tl.where(col < C, -1e30, -3e38)[None, :]
    grad_ptr += start * C
    grad_at = local[:, None] * C + col[None, :]
    stride_n = tl.multiple_of(stride_n.to(tl.int64), ALIGNED)
    logits_ptr += start * tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
    if WIDE:
        at = local.to(tl.int64)[:, None] * tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
        at += col.to(tl.int64)[None, :] * stride_c
    else:
        at = local[:, None] * tl.multiple_of(stride_b.to(tl.int32), ALIGNED)
        at += col[None, :] * stride_c

    x = _load(logits_ptr + tl.maximum(first, 0).to(tl.int64) * stride_n + at, mask, floor)
    y = _load(logits_ptr + (first + 1).to(tl.int64) * stride_n + at, mask, floor)
    x_top, x_lse, p = _softmax(x, INV_T)
    grad = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(EDGES):
        edge = first + i
        # The row after next is on its way while this edge is computed.
        ahead = tl.minimum(edge + 2, N - 1).to(tl.int64)
        following = _load(logits_ptr + ahead * stride_n + at, mask, floor)
        y_top, y_lse, q = _softmax(y, INV_T)
        d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T)
        if GRAD:
            alone = tl.sum(_alone(d, p, q), 1, keep_dims=True) > 1.0
        larger, below, h, gap = _terms(d, p, q)
        is_edge = (edge >= 0) & (edge < N - 1)
        if VALUE:
            if FISHER:
                h = _hellinger_term(d, p, q)
            value = _finish_value(tl.sum(h, 1), tl.sum(gap, 1), FISHER)
            if is_edge & (edge >= first + HALO):
                if VALUE == 1:
                    tl.store(value_ptr + edge.to(tl.int64) * B + row, value, mask=row_ok)
                else:
                    share = tl.sum(tl.where(row_ok, value, 0.0), 0) / B
                    tl.store(value_ptr + tl.program_id(0).to(tl.int64) * (N - 1) + edge, share)
        if GRAD:
            scale = tl.where(is_edge, 0.5 * INV_T, 0.0)
            if UPSTREAM:
                weights = tl.minimum(tl.maximum(edge, 0), N - 2).to(tl.int64) * stride_ue
                weights = weights + row * stride_ub
                weight = tl.load(upstream_ptr + weights, mask=row_ok, other=0.0)
                scale *= weight[:, None]
            if MEAN:
                scale /= B
            larger = tl.where(alone, below, larger)
            log_p = larger + tl.minimum(d, 0.0)
            grad += scale * p * (log_p - tl.sum(p * log_p, 1, keep_dims=True))
            if (edge >= first + HALO) & (edge < N):
                here = grad_ptr + edge.to(tl.int64) * B * C + grad_at
                tl.store(here, _close_row(grad, p).to(grad_ptr.dtype.element_ty), mask=mask)
            log_q = larger - tl.maximum(d, 0.0)
            grad = scale * q * (log_q - tl.sum(q * log_q, 1, keep_dims=True))
        x, x_top, x_lse, p = y, y_top, y_lse, q
        y = following
    if GRAD and not HALO:
        last = grad_ptr + (first + EDGES).to(tl.int64) * B * C + grad_at
        tl.store(last, _close_row(grad, p).to(grad_ptr.dtype.element_ty), mask=mask)


@jit
def _tile(row_ptr, start, stride_c, C: tl.constexpr, TILE: tl.constexpr):
    """[TILE] logits of one row from class `start` on, and which classes they are."""
    col = start + tl.arange(0, TILE)
    floor = tl.where(col < C, -1e30, -3e38)
    return _load(row_ptr + col * stride_c, col < C, floor), col


@jit
def _sweep_lse(row_ptr, stride_c, C: tl.constexpr, INV_T: tl.constexpr, TILE: tl.constexpr):
    """The largest logit of a row, log sum exp(x / T) without it, and 1 / sum."""
    top = tl.full([TILE], -3.3e38, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, C, TILE):
        x, _ = _tile(row_ptr, start, stride_c, C, TILE)
        rise = (x - top) * INV_T
        e = _exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * e + 1.0, total + e)
        top = tl.maximum(top, x)
    best = tl.max(top, 0)
    total = tl.sum(total * _exp((top - best) * INV_T), 0)
    return best, tl.log(total), 1.0 / total


@jit
def _sweep_edge(
    x_ptr,
    y_ptr,
    x_top,
    y_top,
    x_lse,
    y_lse,
    x_inv,
    y_inv,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    FISHER: tl.constexpr,
    GRAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Value, KL(p || m) and KL(q || m) of one edge; whether the two are less log 2."""
    total = tl.zeros([TILE], tl.float32)
    gap = tl.zeros([TILE], tl.float32)
    kl_p = tl.zeros([TILE], tl.float32)
    kl_q = tl.zeros([TILE], tl.float32)
    below_p = tl.zeros([TILE], tl.float32)
    below_q = tl.zeros([TILE], tl.float32)
    alone = tl.zeros([TILE], tl.float32)
    # Backwards: what the sweep before this one read last is still in the cache.
    for back in range(0, C, TILE):
        start = (C - 1) // TILE * TILE - back
        x, _ = _tile(x_ptr, start, stride_c, C, TILE)
        y, _ = _tile(y_ptr, start, stride_c, C, TILE)
        p = _exp((x - x_top) * INV_T) * x_inv
        q = _exp((y - y_top) * INV_T) * y_inv
        d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T)
        larger, below, h, difference = _terms(d, p, q)
        if FISHER:
            h = _hellinger_term(d, p, q)
        total += h
        gap += difference
        if GRAD:
            kl_p += p * (larger + tl.minimum(d, 0.0))
            kl_q += q * (larger - tl.maximum(d, 0.0))
            below_p += p * (below + tl.minimum(d, 0.0))
            below_q += q * (below - tl.maximum(d, 0.0))
            alone += _alone(d, p, q)
    value = _finish_value(tl.sum(total, 0), tl.sum(gap, 0), FISHER)
    less = tl.sum(alone, 0) > 1.0
    kl_of_p = tl.where(less, tl.sum(below_p, 0), tl.sum(kl_p, 0))
    kl_of_q = tl.where(less, tl.sum(below_q, 0), tl.sum(kl_q, 0))
    return value, kl_of_p, kl_of_q, less


@jit
def _sweep_grad(
    grad_ptr,
    w_ptr,
    x_ptr,
    y_ptr,
    w_top,
    x_top,
    y_top,
    w_lse,
    x_lse,
    y_lse,
    x_inv,
    left,  # of the edge (w, x), then of (x, y): weight, KL, and whether it is less log 2
    left_kl,
    left_less,
    right,
    right_kl,
    right_less,
    has_left,
    has_right,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradient of one row x between its neighbours w and y."""
    rest = tl.zeros([TILE], tl.float32)
    leader = tl.full([TILE], -1, tl.int32)
    for start in range(0, C, TILE):
        x, col = _tile(x_ptr, start, stride_c, C, TILE)
        p = _exp((x - x_top) * INV_T) * x_inv
        grad = tl.zeros([TILE], tl.float32)
        if has_left:
            w, _ = _tile(w_ptr, start, stride_c, C, TILE)
            d = _log_ratio(x, w, x_top, w_top, x_lse, w_lse, INV_T)
            larger, below, _, _ = _terms(d, p, p)
            log_p = tl.where(left_less, below, larger) + tl.minimum(d, 0.0)
            grad += left * (log_p - left_kl)
        if has_right:
            y, _ = _tile(y_ptr, start, stride_c, C, TILE)
            d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T)
            larger, below, _, _ = _terms(d, p, p)
            log_p = tl.where(right_less, below, larger) + tl.minimum(d, 0.0)
            grad += right * (log_p - right_kl)
        grad *= p
        leads = p > 0.5
        rest += tl.where(leads, 0.0, grad)
        leader = tl.where(leads, col, leader)
        grad = grad.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + col, grad, mask=(col < C) & (p <= 0.5))
    leader = tl.max(leader, 0)
    rest = -tl.sum(rest, 0)
    tl.store(grad_ptr + leader, rest.to(grad_ptr.dtype.element_ty), mask=leader >= 0)


@kernel
def _path_tiles_kernel(
    logits_ptr,  # [N, B, C]
    upstream_ptr,  # [E, B]
    value_ptr,  # [E, B], or [B, E]
    grad_ptr,  # [N, B, C], contiguous
    N,
    B,
    stride_n,
    stride_b,
    stride_c,
    stride_ue,
    stride_ub,
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    VALUE: tl.constexpr,
    FISHER: tl.constexpr,
    GRAD: tl.constexpr,
    UPSTREAM: tl.constexpr,
    MEAN: tl.constexpr,
    EDGES: tl.constexpr,
    SEGMENT: tl.constexpr,
    HALO: tl.constexpr,
    ROWS: tl.constexpr,  # 1
    BLOCK: tl.constexpr,
):
    """Rows longer than a tile, one at a time; arguments as of `_path_rows_kernel`."""
    if WIDE:
        stride_c = tl.cast(stride_c, tl.int64)
    stride_n = tl.multiple_of(stride_n.to(tl.int64), ALIGNED)
    stride_b = tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
    row = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(1) * SEGMENT - HALO
    logits_ptr += row * stride_b
    grad_ptr += row * C
    x_ptr = logits_ptr + tl.maximum(first, 0).to(tl.int64) * stride_n
    x_top, x_lse, x_inv = _sweep_lse(x_ptr, stride_c, C, INV_T, BLOCK)
    w_ptr, w_top, w_lse = x_ptr, x_top, x_lse
    left = x_lse * 0
    left_kl = x_lse * 0
    left_less = left > 0
    for i in range(EDGES):
        edge = first + i
        y_ptr = logits_ptr + tl.minimum(edge + 1, N - 1).to(tl.int64) * stride_n
        is_edge = (edge >= 0) & (edge < N - 1)
        y_top, y_lse, y_inv = _sweep_lse(y_ptr, stride_c, C, INV_T, BLOCK)
        value, kl_p, kl_q, less = _sweep_edge(
            x_ptr,
            y_ptr,
            x_top,
            y_top,
            x_lse,
            y_lse,
            x_inv,
            y_inv,
            stride_c,
            C,
            INV_T,
            FISHER,
            GRAD,
            BLOCK,
        )
        if is_edge & (edge >= first + HALO):
            if VALUE == 1:
                tl.store(value_ptr + edge.to(tl.int64) * B + row, value)
            if VALUE == 2:
                tl.store(value_ptr + row * (N - 1) + edge, value / B)
        if GRAD:
            right = tl.where(is_edge, 0.5 * INV_T, 0.0)
            if UPSTREAM:
                weights = tl.minimum(tl.maximum(edge, 0), N - 2).to(tl.int64) * stride_ue
                weights += row * stride_ub
                right *= tl.load(upstream_ptr + weights)
            if MEAN:
                right /= B
            if (edge >= first + HALO) & (edge < N):
                _sweep_grad(
                    grad_ptr + edge.to(tl.int64) * B * C,
                    w_ptr,
                    x_ptr,
                    y_ptr,
                    w_top,
                    x_top,
                    y_top,
                    w_lse,
                    x_lse,
                    y_lse,
                    x_inv,
                    left,
                    left_kl,
                    left_less,
                    right,
                    kl_p,
                    less,
                    edge > 0,
                    is_edge,
                    stride_c,
                    C,
                    INV_T,
                    BLOCK,
                )
            left, left_kl, left_less = right, kl_q, less
            w_ptr, w_top, w_lse = x_ptr, x_top, x_lse
        x_ptr, x_top, x_lse, x_inv = y_ptr, y_top, y_lse, y_inv
    if GRAD and not HALO:
        _sweep_grad(
            grad_ptr + (first + EDGES).to(tl.int64) * B * C,
            w_ptr,
            x_ptr,
            x_ptr,
            w_top,
            x_top,
            x_top,
            w_lse,
            x_lse,
            x_lse,
            x_inv,
            left,
            left_kl,
            left_less,
            left,
            left_kl,
            left_less,
            EDGES > 0,
            EDGES < 0,
            stride_c,
            C,
            INV_T,
            BLOCK,
        )


# --- Launcher -------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """How a path is cut into programs."""

    rows: int  # of the batch, in a tile
    block: int  # classes in a tile
    segment: int  # points that a program owns; a whole path where it is N
    warps: int
    tiled: bool  # a row is longer than a tile


# Set by TRITON_INTERPRET=1 before triton is imported: kernels run in Python, on CPU tensors.
INTERPRETED = triton is not None and not isinstance(_path_rows_kernel, triton.JITFunction)

WHOLE_ROW = 4096  # classes up to which a row is one tile; registers of 16 warps hold it
TILE = 2048


def choose_blocks(points: int, batch: int, classes: int, processors: int) -> Blocks:
    """Block sizes from the shape and the number of multiprocessors (1: never cut the path).

    A thread gets 8 numbers of a tile, 16 where fewer warps then share the sums over a row, and 4
    of a row in tiles, which has more sums to keep (`python -m benchmarks.resources` prints the
    registers this takes). Tiny problems take the whole batch in one program, which then also
    sums it. Where a multiprocessor would get less than 16 warps the path is cut; each further
    piece reads two rows more.
    """
    block = max(4, 1 << (classes - 1).bit_length())
    tiled = block > WHOLE_ROW
    if tiled:
        rows, block, warps = 1, TILE, 16
    elif batch * block <= 4096:
        rows = 1 << (batch - 1).bit_length()
        warps = max(1, rows * block // 512)
    elif block == 1024:
        rows, warps = 1, 2
    else:
        rows = max(1, 1024 // block)
        warps = max(4, block // 256)
    programs = -(-batch // rows)
    pieces = min(points, max(1, 16 * processors // (programs * warps))) if processors > 1 else 1
    return Blocks(rows, block, -(-points // pieces), warps, tiled)


def _launch(
    logits: Tensor,
    temperature: float,
    value: str,
    upstream: Optional[Tensor] = None,
    grad: bool = False,
) -> Tuple[Optional[Tensor], Optional[Tensor]]:
    """One launch over [N, B, C] logits; `value` is "none", "rows", "mean" or "fisher"."""
    points, batch, classes = logits.shape
    blocks = choose_blocks(points, batch, classes, _processors(logits.device))
    programs = -(-batch // blocks.rows)
    shape = {"none": (0,), "mean": (programs, points - 1)}.get(value, (points - 1, batch))
    values = logits.new_empty(shape, dtype=torch.float32)
    dlogits = logits.new_empty(logits.shape if grad else (0,))
    with torch.cuda.device(logits.device if logits.is_cuda else -1):
        kernel_for(blocks)[(programs, -(-points // blocks.segment))](
            logits,
            logits if upstream is None else upstream,
            values,
            dlogits,
            points,
            batch,
            *logits.stride(),
            *((0, 0) if upstream is None else upstream.stride()),
            **constants(
                points,
                classes,
                blocks,
                aligned=_aligned(logits),
                wide=_wide(logits, blocks.rows),
                temperature=temperature,
                value=value,
                grad=grad,
                upstream=upstream is not None,
                mean=value == "mean",
            ),
            **options(blocks, nvidia=torch.version.hip is None),
        )
    if value == "mean":
        values = values[0] if programs == 1 else values.sum(0)
    return values, dlogits


def kernel_for(blocks: Blocks):
    return _path_tiles_kernel if blocks.tiled else _path_rows_kernel


def options(blocks: Blocks, nvidia: bool) -> Dict[str, object]:
    """How a launch is compiled. Where a product may be fused with a sum is written out, so that
    the reversed path gives the same bits."""
    chosen: Dict[str, object] = {"num_warps": blocks.warps, "enable_fp_fusion": False}
    if nvidia and blocks.warps in (2, 16):
        # Or the assembler spills a few registers to fit one more program of this size.
        chosen["maxnreg"] = 248 if blocks.warps == 2 else 128
    return chosen


def constants(
    points: int,
    classes: int,
    blocks: Blocks,
    *,
    aligned: int,
    wide: bool,
    temperature: float,
    value: str,
    grad: bool,
    upstream: bool,
    mean: bool,
) -> Dict[str, object]:
    """The constexpr arguments of a launch."""
    whole = blocks.segment >= points
    return dict(
        ALIGNED=aligned,
        WIDE=wide,
        C=classes,
        INV_T=1 / temperature,
        VALUE={"none": 0, "mean": 2}.get(value, 1),
        FISHER=value == "fisher",
        GRAD=grad,
        UPSTREAM=upstream,
        MEAN=mean,
        EDGES=points - 1 if whole else blocks.segment + 1,
        SEGMENT=blocks.segment,
        HALO=0 if whole else 1,
        ROWS=blocks.rows,
        BLOCK=blocks.block,
    )


def _aligned(logits: Tensor) -> int:
    """The power of two, 16 bytes at most, that divides the strides of points and rows; the
    compiler itself only sees multiples of 16 elements and would read 1,000 classes one by one."""
    if logits.stride(2) != 1:
        return 1
    return math.gcd(16 // logits.element_size(), *logits.stride()[:2])


def _wide(logits: Tensor, rows: int) -> bool:
    """A program's rows reach further than a 32-bit offset."""
    _, _, classes = logits.shape
    return rows * logits.stride(1) + classes * logits.stride(2) >= 1 << 31


@functools.lru_cache(maxsize=None)
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- Operators: opaque to torch.compile, known to vmap --------------------------------------------

# The module's own name, so that two copies of this folder in one process do not collide.
_NAMESPACE = __name__.replace(".", "_")


def _rows(logits: Tensor, temperature: float, fisher: bool) -> Tensor:
    return _launch(logits, temperature, "fisher" if fisher else "rows")[0]


def _grad(logits: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    return _launch(logits, temperature, "none", upstream, grad=True)[1]


def _value_and_grad(
    logits: Tensor, upstream: Optional[Tensor], mean: bool, temperature: float
) -> Tuple[Tensor, Tensor]:
    return _launch(logits, temperature, "mean" if mean else "rows", upstream, grad=True)


_rows_op = torch.library.custom_op(
    f"{_NAMESPACE}::rows",
    _rows,
    mutates_args=(),
    schema="(Tensor logits, float temperature, bool fisher) -> Tensor",
)
_grad_op = torch.library.custom_op(
    f"{_NAMESPACE}::grad",
    _grad,
    mutates_args=(),
    schema="(Tensor logits, Tensor upstream, float temperature) -> Tensor",
)
_value_and_grad_op = torch.library.custom_op(
    f"{_NAMESPACE}::value_and_grad",
    _value_and_grad,
    mutates_args=(),
    schema="(Tensor logits, Tensor? upstream, bool mean, float temperature) -> (Tensor, Tensor)",
)


@_rows_op.register_fake
def _(logits, temperature, fisher):
    points, batch, _ = logits.shape
    return logits.new_empty((points - 1, batch), dtype=torch.float32)


@_grad_op.register_fake
def _(logits, upstream, temperature):
    return logits.new_empty(logits.shape)


@_value_and_grad_op.register_fake
def _(logits, upstream, mean, temperature):
    points, batch, _ = logits.shape
    shape = (points - 1,) if mean else (points - 1, batch)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(logits.shape)


def _fold(tensor: Tensor, dim: Optional[int], size: int) -> Tensor:
    """Moves the dimension that vmap maps over into the batch, which is dimension 1."""
    if dim is None:
        tensor = tensor.unsqueeze(1).expand(-1, size, *tensor.shape[1:])
    else:
        tensor = tensor.movedim(dim, 1)
    return tensor.flatten(1, 2)


@_rows_op.register_vmap
def _(info, in_dims, logits, temperature, fisher):
    rows = _rows_op(_fold(logits, in_dims[0], info.batch_size), temperature, fisher)
    return rows.unflatten(1, (info.batch_size, -1)), 1


@_grad_op.register_vmap
def _(info, in_dims, logits, upstream, temperature):
    logits = _fold(logits, in_dims[0], info.batch_size)
    upstream = _fold(upstream, in_dims[1], info.batch_size)
    return _grad_op(logits, upstream, temperature).unflatten(1, (info.batch_size, -1)), 1


@_value_and_grad_op.register_vmap
def _(info, in_dims, logits, upstream, mean, temperature):
    logits = _fold(logits, in_dims[0], info.batch_size)
    if upstream is not None:
        upstream = _fold(upstream, in_dims[1], info.batch_size)
    elif mean:
        upstream = logits.new_ones((1, 1), dtype=torch.float32).expand(
            logits.shape[0] - 1, logits.shape[1]
        )
    if mean:
        upstream = upstream / (logits.shape[1] // info.batch_size)
    value, grad = _value_and_grad_op(logits, upstream, False, temperature)
    value = value.unflatten(1, (info.batch_size, -1))
    return (value.mean(2) if mean else value, grad.unflatten(1, (info.batch_size, -1))), (1, 1)


class _PathJSDiv(torch.autograd.Function):
    """[N, B, C] logits -> [E, B] nats, any upstream gradient, first order only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, temperature: float) -> Tensor:
        return _rows_op(logits, temperature, False)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, ctx.temperature = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (logits,) = ctx.saved_tensors
        return _grad_op(logits, upstream, ctx.temperature), None


# --- Public ---------------------------------------------------------------------------------------


def path_js_div(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    edge_weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence between neighbouring rows of a path of logits.

    In exact arithmetic the same as::

        p = (logits / temperature).softmax(-1)
        m = (p[:-1] + p[1:]) / 2
        kl = lambda p: (p * (p / m).log()).sum(-1)
        (kl(p[:-1]) + kl(p[1:])).div(2).mean(-1)

    Args:
        logits: [N, B, C] with N >= 2, floating point, any strides. Computed in fp32 (fp64 for
            fp64 logits, in plain PyTorch). Classes with a logit of -inf in both rows drop out;
            in one row only they give the limit of a probability that goes to 0. A row of
            nothing but -inf counts as uniform.
        reduction: "batchmean" averages over B; "none" keeps every row.
        edge_weight: [E], multiplies the values.
        sample_weight: [B], non-negative or bool: "batchmean" is then the weighted mean
            (0 where all weights are 0); "none" multiplies every row by its weight.
        temperature: divides the logits; between 1e-6 and 1e6.
        impl: "triton" (on a GPU; on a CPU under TRITON_INTERPRET=1), "torch", or "auto": Triton
            for fp32, bf16 and fp16 logits on a GPU, else PyTorch.

    Returns:
        [E] or [E, B] nats, E = N - 1, each within [0, ln 2] before the weights; fp32 (fp64 for
        fp64 logits). Differentiable once, under any upstream gradient; second derivatives and
        forward-mode differentiation raise.

    Raises:
        TypeError: logits or weights that are not real floating point tensors.
        ValueError: another shape than [N >= 2, B >= 1, C >= 1], weights of another shape or
            device, a temperature out of range, an unknown reduction or impl.
        RuntimeError: impl="triton" where it cannot run; the message says what is missing.

    Example:
        >>> path_js_div(torch.zeros(3, 5, 10))
        tensor([0., 0.])
    """
    reference.check_options(logits, reduction, edge_weight, sample_weight, temperature)
    if not _use_triton(logits, impl):
        return reference.path_js_div(
            logits,
            reduction=reduction,
            edge_weight=edge_weight,
            sample_weight=sample_weight,
            temperature=temperature,
        )
    rows = _PathJSDiv.apply(logits, float(temperature))
    return reference.reduce_rows(rows, reduction, edge_weight, sample_weight)


def path_js_div_value_and_grad(
    logits: Tensor,
    edge_weight: Optional[Tensor] = None,
    *,
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tuple[Tensor, Tensor]:
    """Divergence of every edge, and the gradient of their (weighted) sum, in one call.

    Equivalent to::

        value = path_js_div(logits)
        (grad,) = torch.autograd.grad((edge_weight * value).sum(), logits)

    On a GPU one launch reads the logits once and writes the gradient once; batches that need more
    than one program add a sum of the programs' shares of the value.

    Args:
        logits: [N, B, C] with N >= 2, floating point, any strides; -inf as in `path_js_div`.
        edge_weight: [E], one weight an edge; all 1 by default.
        sample_weight: [B], non-negative or bool; the means over B are weighted means.
        temperature, impl: as in `path_js_div`.

    Returns:
        [E] nats (fp32, or fp64 for fp64 logits), not multiplied by edge_weight; and [N, B, C] in
        the logits' dtype, contiguous. Neither is attached to the graph.

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`.

    Example:
        >>> value, grad = path_js_div_value_and_grad(torch.randn(25, 256, 10))
        >>> value.shape, grad.shape
        (torch.Size([24]), torch.Size([25, 256, 10]))
    """
    reference.check_options(logits, "batchmean", edge_weight, sample_weight, temperature)
    if not _use_triton(logits, impl):
        return reference.path_js_div_value_and_grad(
            logits, edge_weight, sample_weight=sample_weight, temperature=temperature
        )
    with torch.no_grad():
        if sample_weight is not None:
            upstream = reference.row_weights(logits, edge_weight, sample_weight)
            rows, grad = _value_and_grad_op(logits, upstream, False, float(temperature))
            return reference.reduce_rows(rows, "batchmean", None, sample_weight), grad
        if edge_weight is None:
            return _value_and_grad_op(logits, None, True, float(temperature))
        upstream = edge_weight.float()[:, None].expand(-1, logits.shape[1])
        return _value_and_grad_op(logits, upstream, True, float(temperature))


def js_div(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    reduction: str = "batchmean",
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence between two tensors of logits: a path of two points.

    In exact arithmetic the same as::

        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        log_m = ((p + q) / 2).log()
        kl = lambda p: F.kl_div(log_m, p, reduction="none").sum(-1)
        (kl(p) + kl(q)).div(2).mean()

    Args:
        p_logits, q_logits: [..., C], floating point, of one shape, dtype and device.
        reduction: "batchmean" averages over everything but C; "none" keeps every row.
        sample_weight: [...], non-negative or bool, as in `path_js_div`.
        temperature, impl: as in `path_js_div`.

    Returns:
        A scalar, or [...], in nats within [0, ln 2]. Differentiable once, in both arguments.

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`, and for arguments that differ in
            shape, dtype or device.

    Example:
        >>> js_div(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
        tensor(0.6931)
    """
    for name, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    p, q = ((list(x.shape), x.dtype, x.device) for x in (p_logits, q_logits))
    if p != q:
        raise ValueError(
            f"p_logits and q_logits must have one shape, dtype and device, got {p} and {q}"
        )
    if p_logits.ndim < 1 or p_logits.numel() == 0:
        raise ValueError(f"p_logits must be [..., C] and not empty, got {list(p_logits.shape)}")
    leading = p_logits.shape[:-1]
    if sample_weight is not None:
        if tuple(sample_weight.shape) != tuple(leading):
            raise ValueError(
                f"sample_weight must be {list(leading)}, got {list(sample_weight.shape)}"
            )
        sample_weight = sample_weight.reshape(-1)
    path = torch.stack([x.reshape(-1, x.shape[-1]) for x in (p_logits, q_logits)])
    value = path_js_div(
        path,
        reduction=reduction,
        sample_weight=sample_weight,
        temperature=temperature,
        impl=impl,
    )[0]
    return value if reduction == "batchmean" else value.reshape(leading)


@torch.no_grad()
def path_fisher_rao(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Fisher-Rao distance between neighbouring rows of a path of logits; not differentiable.

    In exact arithmetic the same as::

        p = (logits / temperature).softmax(-1)
        d = 2 * (p[:-1] * p[1:]).sqrt().sum(-1).acos()
        d.square().mean(-1).sqrt()

    but evaluated as 4 asin(|sqrt p - sqrt q| / 2), which keeps its digits for near-equal rows.

    Args:
        logits: [N, B, C] with N >= 2, floating point.
        reduction: "batchmean" gives the distance of the joint distributions p(x) p(y | x), the
            root mean square over B; "none" the distance of every row, whatever its weight.
        sample_weight: [B], non-negative or bool; the mean square is then the weighted one.
        temperature, impl: as in `path_js_div`.

    Returns:
        [E] or [E, B] radians, each within [0, pi]; fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`.

    Example:
        >>> path_fisher_rao(torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]]))
        tensor([3.1416])
    """
    reference.check_options(logits, reduction, None, sample_weight, temperature)
    if not _use_triton(logits, impl):
        return reference.path_fisher_rao(
            logits, reduction=reduction, sample_weight=sample_weight, temperature=temperature
        )
    hellinger = _rows_op(logits, float(temperature), True)
    return reference.reduce_fisher_rao(hellinger, reduction, sample_weight)


def _use_triton(logits: Tensor, impl: str) -> bool:
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl must be 'auto', 'triton' or 'torch', got {impl!r}")
    if impl == "torch" or (impl == "auto" and not logits.is_cuda):
        return False
    missing = _what_is_missing(logits)
    if missing and impl == "triton":
        raise RuntimeError(f"impl='triton' cannot run: {missing}")
    if missing and not torch.compiler.is_compiling():
        _say_once(f"the path divergence runs in plain PyTorch on a GPU: {missing}")
    return not missing


def _what_is_missing(logits: Tensor) -> str:
    if triton is None:
        return "the package triton is not installed"
    if not logits.is_cuda and not INTERPRETED:
        return f"the logits are on {logits.device}, not on a GPU (nor is TRITON_INTERPRET=1 set)"
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 or float16 logits, got {logits.dtype}"
    return ""


@functools.lru_cache(maxsize=None)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)
