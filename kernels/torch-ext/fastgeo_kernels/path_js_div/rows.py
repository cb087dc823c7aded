"""The path divergence where a row fits into a tile: logits are read and gradients written once."""

from __future__ import annotations

from ..launching import tl
from .terms import (
    _close_row,
    _finish_value,
    _hellinger_term,
    _load,
    _log_ratio,
    _softmax,
    _terms,
    kernel,
)


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
    AXIS: tl.constexpr,  # of the classes
):
    """Rows that fit a tile: of each point [BLOCK, ROWS] at a time where AXIS is 0, [ROWS, BLOCK]
    where it is 1. Of up to 16 classes a thread holds whole rows, whose sums need no other one."""
    if BLOCK <= 16:
        stride_c *= tl.minimum(N, 1)  # 1, unknown to the compiler: it would split rows to load them
    start = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(1) * SEGMENT - HALO
    local = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    row = start + local
    row_ok = row < B
    mask = tl.expand_dims(row_ok, AXIS) & tl.expand_dims(col < C, 1 - AXIS)
    floor = tl.expand_dims(tl.where(col < C, -1e30, -3e38), 1 - AXIS)
    grad_ptr += start * C
    grad_at = tl.expand_dims(local, AXIS) * C + tl.expand_dims(col, 1 - AXIS)
    stride_n = tl.multiple_of(stride_n.to(tl.int64), ALIGNED)
    logits_ptr += start * tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
    if WIDE:
        local = local.to(tl.int64)
        col = col.to(tl.int64)
    # A hint would not survive on a 32-bit argument; this does.
    at = tl.expand_dims(local * (stride_b // ALIGNED * ALIGNED), AXIS)
    at = at + tl.expand_dims(col * stride_c, 1 - AXIS)

    x = _load(logits_ptr + tl.maximum(first, 0).to(tl.int64) * stride_n + at, mask, floor)
    y = _load(logits_ptr + (first + 1).to(tl.int64) * stride_n + at, mask, floor)
    x_top, x_lse, p = _softmax(x, INV_T, AXIS)
    grad = tl.zeros_like(p)
    # Of a point by itself the first edge only begins its gradient; unrolled, nothing else is left.
    for i in (tl.static_range if EDGES == 2 else tl.range)(EDGES):
        edge = first + i
        # The row after next is on its way while this edge is computed.
        ahead = tl.minimum(edge + 2, N - 1).to(tl.int64)
        following = _load(logits_ptr + ahead * stride_n + at, mask, floor)
        y_top, y_lse, q = _softmax(y, INV_T, AXIS)
        d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T)
        # Less than 1/4: most of p and of q is on classes that the other lacks.
        overlap = tl.sum(tl.minimum(p, q), AXIS, keep_dims=True)
        shift = tl.where(overlap < 0.25, 0.6931471805599453, 0.0)
        log_p, log_q, h = _terms(d, p, q, shift)
        kl_p = tl.sum(p * log_p, AXIS, keep_dims=True)
        kl_q = tl.sum(q * log_q, AXIS, keep_dims=True)
        is_edge = (edge >= 0) & (edge < N - 1)
        if VALUE:
            if FISHER:
                h = _hellinger_term(d, p, q)
            value = _finish_value(tl.sum(h, AXIS, keep_dims=True), kl_p, kl_q, shift, FISHER)
            value = tl.reshape(value, [ROWS])
            if is_edge & (i >= HALO):
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
                scale *= tl.expand_dims(weight, AXIS)
            if MEAN:
                scale /= B
            if i >= HALO:
                grad = tl.fma(p, tl.fma(log_p, scale, -scale * kl_p), grad)
                if edge < N:
                    here = grad_ptr + edge.to(tl.int64) * B * C + grad_at
                    closed = _close_row(grad, p, AXIS).to(grad_ptr.dtype.element_ty)
                    tl.store(here, closed, mask=mask)
            grad = q * tl.fma(log_q, scale, -scale * kl_q)
        x, x_top, x_lse, p = y, y_top, y_lse, q
        y = following
    if GRAD and not HALO:
        last = grad_ptr + (first + EDGES).to(tl.int64) * B * C + grad_at
        tl.store(last, _close_row(grad, p, AXIS).to(grad_ptr.dtype.element_ty), mask=mask)
