"""The divergence of two tensors of rows, which need not lie in one: pairs of rows, each by itself.

Each of the two gradients is computed where it is asked for, and may be written over its logits: a
program has read what it writes over.
"""

from __future__ import annotations

from ..launching import jit, tl
from .terms import (
    _close_row,
    _far_apart,
    _finish_value,
    _load,
    _log_ratio,
    _softmax,
    _terms,
    _without_overlap,
)
from .tiles import _close, _edge_tile, _row, _sums, _write

pair_kernel = jit(do_not_specialize=["B", "p_stride", "q_stride", "u_stride"])


@pair_kernel
def pair_rows_kernel(
    p_ptr,  # [B, C], classes side by side, as q and the gradients
    q_ptr,
    kept_ptr,  # [B], whether a row is read
    upstream_ptr,  # [B]
    value_ptr,  # [B]
    p_grad_ptr,
    q_grad_ptr,
    B,
    p_stride,  # of rows
    q_stride,
    u_stride,
    inv_t,  # as of `path_rows_kernel`
    a,
    b,
    p_limit,
    q_limit,
    P_ALIGNED: tl.constexpr,  # divides p_stride
    Q_ALIGNED: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    KEPT: tl.constexpr,
    VALUE: tl.constexpr,
    P_GRAD: tl.constexpr,
    Q_GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    AXIS: tl.constexpr,  # of the classes
):
    """Rows that fit a tile, laid out as in `path_rows_kernel`."""
    how = (inv_t, a, b, p_limit, q_limit)
    unit = 1
    if BLOCK <= 16:
        unit = tl.minimum(B, 1)  # 1, unknown to the compiler: it would split rows to load them
    start = tl.program_id(0).to(tl.int64) * ROWS
    local = tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    row = start + local
    row_ok = row < B
    read_row = row_ok
    if KEPT:
        read_row = row_ok & (tl.load(kept_ptr + row, mask=row_ok, other=0) != 0)
    inside = tl.expand_dims(col < C, 1 - AXIS)
    mask = tl.expand_dims(row_ok, AXIS) & inside
    read = tl.expand_dims(read_row, AXIS) & inside
    floor = tl.expand_dims(tl.where(col < C, -1e30, -3e38), 1 - AXIS)
    p_step = tl.multiple_of(p_stride.to(tl.int64), P_ALIGNED)
    q_step = tl.multiple_of(q_stride.to(tl.int64), Q_ALIGNED)
    across = tl.expand_dims(col * unit, 1 - AXIS)
    p_at = tl.expand_dims(local * (p_stride // P_ALIGNED * P_ALIGNED), AXIS) + across
    q_at = tl.expand_dims(local * (q_stride // Q_ALIGNED * Q_ALIGNED), AXIS) + across
    x = _load(p_ptr + start * p_step + p_at, read, floor)
    y = _load(q_ptr + start * q_step + q_at, read, floor)
    x_top, x_lse, p = _softmax(x, inv_t, AXIS)
    y_top, y_lse, q = _softmax(y, inv_t, AXIS)
    d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, inv_t)
    shifted = _without_overlap(p, q, AXIS)
    p_log, q_log, h = _terms(d, p, q, shifted, how, KIND)
    p_kl = tl.sum(p_log, AXIS, keep_dims=True)
    q_kl = tl.sum(q_log, AXIS, keep_dims=True)
    if VALUE:
        total = tl.sum(h, AXIS, keep_dims=True)
        value = _finish_value(total, p_kl, q_kl, shifted, how, KIND, False)
        tl.store(value_ptr + row, tl.reshape(value, [ROWS]), mask=row_ok)
    if P_GRAD or Q_GRAD:
        weight = tl.load(upstream_ptr + row * u_stride, mask=read_row, other=0.0)
        scale = tl.expand_dims(weight * inv_t, AXIS)
        at = start * C + tl.expand_dims(local * C, AXIS) + tl.expand_dims(col, 1 - AXIS)
        if P_GRAD:
            grad = _close_row(tl.fma(-p, p_kl, p_log) * (scale * a), p, AXIS)
            tl.store(p_grad_ptr + at, grad.to(p_grad_ptr.dtype.element_ty), mask=mask)
        if Q_GRAD:
            grad = _close_row(tl.fma(-q, q_kl, q_log) * (scale * b), q, AXIS)
            tl.store(q_grad_ptr + at, grad.to(q_grad_ptr.dtype.element_ty), mask=mask)


@pair_kernel
def pair_tiles_kernel(
    p_ptr,
    q_ptr,
    kept_ptr,
    upstream_ptr,
    value_ptr,
    p_grad_ptr,
    q_grad_ptr,
    B,
    p_stride,
    q_stride,
    u_stride,
    inv_t,
    a,
    b,
    p_limit,
    q_limit,
    P_ALIGNED: tl.constexpr,
    Q_ALIGNED: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    KEPT: tl.constexpr,
    VALUE: tl.constexpr,
    P_GRAD: tl.constexpr,
    Q_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows longer than a tile, one a program; arguments as of `pair_rows_kernel`."""
    how = (inv_t, a, b, p_limit, q_limit)
    row = tl.program_id(0).to(tl.int64)
    read = row >= 0
    if KEPT:
        read = tl.load(kept_ptr + row) != 0
    p_step = tl.multiple_of(p_stride.to(tl.int64), P_ALIGNED)
    q_step = tl.multiple_of(q_stride.to(tl.int64), Q_ALIGNED)
    x = _row(p_ptr + row * p_step, 1, read, inv_t, C, BLOCK)
    y = _row(q_ptr + row * q_step, 1, read, inv_t, C, BLOCK)
    shifted = row < 0
    total, p_kl, q_kl = _sums(x, y, shifted, 1, read, how, KIND, False, C, BLOCK)
    value = _finish_value(total, p_kl, q_kl, shifted, how, KIND, False)
    if VALUE:
        tl.store(value_ptr + row, value)
    if P_GRAD or Q_GRAD:
        if KIND < 2:
            shifted = _far_apart(value, how, KIND)
            if shifted:
                _, p_kl, q_kl = _sums(x, y, shifted, 1, read, how, KIND, False, C, BLOCK)
        weight = inv_t * tl.load(upstream_ptr + row * u_stride, mask=read, other=0.0)
        p_grad_ptr += row * C
        q_grad_ptr += row * C
        p_rest = tl.zeros([BLOCK], tl.float32)
        q_rest = tl.zeros([BLOCK], tl.float32)
        p_leader = tl.full([BLOCK], -1, tl.int32)
        q_leader = tl.full([BLOCK], -1, tl.int32)
        for start in range(0, C, BLOCK):
            p, q, d, col = _edge_tile(x, y, start, 1, read, inv_t, C, BLOCK)
            p_log, q_log, _ = _terms(d, p, q, shifted, how, KIND)
            if P_GRAD:
                grad = tl.fma(-p, p_kl, p_log) * (weight * a)
                p_rest, p_leader = _write(p_grad_ptr, grad, p, col, col < C, p_rest, p_leader)
            if Q_GRAD:
                grad = tl.fma(-q, q_kl, q_log) * (weight * b)
                q_rest, q_leader = _write(q_grad_ptr, grad, q, col, col < C, q_rest, q_leader)
        if P_GRAD:
            _close(p_grad_ptr, p_rest, p_leader, True)
        if Q_GRAD:
            _close(q_grad_ptr, q_rest, q_leader, True)
