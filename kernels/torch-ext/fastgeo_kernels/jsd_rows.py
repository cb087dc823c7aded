"""The path divergence where a row fits into a tile: logits are read and gradients written once."""

from __future__ import annotations

from .jsd_terms import (
    _alone,
    _close_row,
    _finish_value,
    _hellinger_term,
    _load,
    _log_ratio,
    _softmax,
    _terms,
    kernel,
)
from .launching import tl


@kernel
def path_rows_kernel(
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
