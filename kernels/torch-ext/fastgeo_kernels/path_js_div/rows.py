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
    _without_overlap,
    kernel,
)


@kernel
def path_rows_kernel(
    logits_ptr,  # [N, B, C]
    upstream_ptr,  # [E, B]
    value_ptr,  # [E, B], or [blocks of rows, E]
    grad_ptr,  # [N, B, C], contiguous
    kept_ptr,  # [B], whether a row is read
    N,
    B,
    stride_n,
    stride_b,
    stride_c,
    stride_ue,
    stride_ub,
    inv_t,  # 1 / temperature
    a,  # weights of p and q in m; for KL 1
    b,
    p_limit,  # -log of them; for KL 0
    q_limit,
    ALIGNED: tl.constexpr,  # divides stride_n and stride_b
    WIDE: tl.constexpr,  # offsets within a program's rows need 64 bits
    C: tl.constexpr,
    KIND: tl.constexpr,  # of divergence, see `_terms`
    KEPT: tl.constexpr,  # whether some rows are not read
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
    how = (inv_t, a, b, p_limit, q_limit)
    start = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(1) * SEGMENT - HALO
    local = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    row = start + local
    row_ok = row < B
    mask = tl.expand_dims(row_ok, AXIS) & tl.expand_dims(col < C, 1 - AXIS)
    read, read_row = mask, row_ok
    if KEPT:
        read_row = row_ok & (tl.load(kept_ptr + row, mask=row_ok, other=0) != 0)
        read = tl.expand_dims(read_row, AXIS) & mask
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

    x = _load(logits_ptr + tl.maximum(first, 0).to(tl.int64) * stride_n + at, read, floor)
    y = _load(logits_ptr + (first + 1).to(tl.int64) * stride_n + at, read, floor)
    x_top, x_lse, p = _softmax(x, inv_t, AXIS)
    grad = tl.zeros_like(p)
    # Of a point by itself the first edge only begins its gradient; unrolled, nothing else is left.
    for i in (tl.static_range if EDGES == 2 else tl.range)(EDGES):
        edge = first + i
        # The row after next is on its way while this edge is computed.
        ahead = tl.minimum(edge + 2, N - 1).to(tl.int64)
        following = _load(logits_ptr + ahead * stride_n + at, read, floor)
        y_top, y_lse, q = _softmax(y, inv_t, AXIS)
        d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, inv_t)
        shifted = _without_overlap(p, q, AXIS)
        p_log, q_log, h = _terms(d, p, q, shifted, how, KIND)
        p_kl = tl.sum(p_log, AXIS, keep_dims=True)
        q_kl = tl.sum(q_log, AXIS, keep_dims=True)
        is_edge = (edge >= 0) & (edge < N - 1)
        if VALUE:
            if FISHER:
                h = _hellinger_term(d, p, q)
            total = tl.sum(h, AXIS, keep_dims=True)
            value = _finish_value(total, p_kl, q_kl, shifted, how, KIND, FISHER)
            value = tl.reshape(value, [ROWS])
            if is_edge & (i >= HALO):
                if VALUE == 1:
                    tl.store(value_ptr + edge.to(tl.int64) * B + row, value, mask=row_ok)
                else:
                    share = tl.sum(tl.where(row_ok, value, 0.0), 0) / B
                    tl.store(value_ptr + tl.program_id(0).to(tl.int64) * (N - 1) + edge, share)
        if GRAD:
            scale = tl.where(is_edge, inv_t, 0.0)
            if UPSTREAM:
                weights = tl.minimum(tl.maximum(edge, 0), N - 2).to(tl.int64) * stride_ue
                weights = weights + row * stride_ub
                weight = tl.load(upstream_ptr + weights, mask=read_row, other=0.0)
                scale *= tl.expand_dims(weight, AXIS)
            if MEAN:
                scale /= B
            if i >= HALO:
                grad = tl.fma(tl.fma(-p, p_kl, p_log), scale * a, grad)
                if edge < N:
                    here = grad_ptr + edge.to(tl.int64) * B * C + grad_at
                    closed = _close_row(grad, p, AXIS).to(grad_ptr.dtype.element_ty)
                    tl.store(here, closed, mask=mask)
            grad = tl.fma(-q, q_kl, q_log) * (scale * b)
        x, x_top, x_lse, p = y, y_top, y_lse, q
        y = following
    if GRAD and not HALO:
        last = grad_ptr + (first + EDGES).to(tl.int64) * B * C + grad_at
        tl.store(last, _close_row(grad, p, AXIS).to(grad_ptr.dtype.element_ty), mask=mask)
