"""The path divergence where a row is swept in tiles: log-sum-exp, sums, gradient."""

from __future__ import annotations

from ..launching import jit, tl
from .terms import (
    _exp,
    _far_apart,
    _finish_value,
    _hellinger_term,
    _load,
    _log_ratio,
    _terms,
    kernel,
)


@jit
def _tile(row_ptr, start, stride_c, read, C: tl.constexpr, TILE: tl.constexpr):
    """[TILE] logits of one row from class `start` on, if it is to be read, and which classes they
    are."""
    col = start + tl.arange(0, TILE)
    floor = tl.where(col < C, -1e30, -3e38)
    return _load(row_ptr + col * stride_c, (col < C) & read, floor), col


@jit
def _row(row_ptr, stride_c, read, inv_t, C: tl.constexpr, TILE: tl.constexpr):
    """A row as the sweeps below take it: its pointer, its largest logit, log sum exp(x / T) without
    that, and 1 / sum."""
    top = tl.full([TILE], -3.3e38, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, C, TILE):
        x, _ = _tile(row_ptr, start, stride_c, read, C, TILE)
        rise = (x - top) * inv_t
        e = _exp(-tl.abs(rise))
        total = tl.where(rise > 0, total * e + 1.0, total + e)
        top = tl.maximum(top, x)
    best = tl.max(top, 0)
    total = tl.sum(total * _exp((top - best) * inv_t), 0)
    return row_ptr, best, tl.log(total), 1.0 / total


@jit
def _edge_tile(x, y, start, stride_c, read, inv_t, C: tl.constexpr, TILE: tl.constexpr):
    """p, q and d = log p - log q of two rows in a tile, and which classes they are."""
    x_ptr, x_top, x_lse, x_inv = x
    y_ptr, y_top, y_lse, y_inv = y
    x, col = _tile(x_ptr, start, stride_c, read, C, TILE)
    y, _ = _tile(y_ptr, start, stride_c, read, C, TILE)
    exponent = inv_t * 1.4426950408889634
    p = tl.exp2((x - x_top) * exponent) * x_inv
    q = tl.exp2((y - y_top) * exponent) * y_inv
    return p, q, _log_ratio(x, y, x_top, y_top, x_lse, y_lse, inv_t), col


@jit
def _sums(
    x,
    y,
    shifted,
    stride_c,
    read,
    how,
    KIND: tl.constexpr,
    FISHER: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of the value's terms and of the two logs' over classes, of two rows."""
    total = tl.zeros([TILE], tl.float32)
    p_kl = tl.zeros([TILE], tl.float32)
    q_kl = tl.zeros([TILE], tl.float32)
    # Backwards: what the sweep before this one read last is still in the cache.
    for back in range(0, C, TILE):
        start = (C - 1) // TILE * TILE - back
        p, q, d, _ = _edge_tile(x, y, start, stride_c, read, how[0], C, TILE)
        p_log, q_log, h = _terms(d, p, q, shifted, how, KIND)
        if FISHER:
            h = _hellinger_term(d, p, q)
        total += h
        p_kl += p_log
        q_kl += q_log
    return tl.sum(total, 0), tl.sum(p_kl, 0), tl.sum(q_kl, 0)


@jit
def _sweep_grad(
    x_grad_ptr,
    y_grad_ptr,
    carry_ptr,
    x,
    y,
    weight,  # of the row, over the temperature
    p_kl,
    q_kl,
    shifted,
    begun,
    owned,
    last,
    last_owned,
    stride_c,
    read,
    how,
    KIND: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds what the edge (x, y) gives to both its rows. x, if `begun` in `carry_ptr`, is then done,
    and y where no edge follows: they are written if owned. Else y is left in `carry_ptr`."""
    inv_t, a, b = how[0], how[1], how[2]
    x_rest = tl.zeros([TILE], tl.float32)
    y_rest = tl.zeros([TILE], tl.float32)
    x_leader = tl.full([TILE], -1, tl.int32)
    y_leader = tl.full([TILE], -1, tl.int32)
    for start in range(0, C, TILE):
        p, q, d, col = _edge_tile(x, y, start, stride_c, read, inv_t, C, TILE)
        inside = col < C
        grad = tl.load(carry_ptr + col, mask=inside & begun, other=0.0)
        p_log, q_log, _ = _terms(d, p, q, shifted, how, KIND)
        grad_y = tl.fma(-q, q_kl, q_log) * (weight * b)
        grad = tl.fma(tl.fma(-p, p_kl, p_log), weight * a, grad)
        if last:
            y_rest, y_leader = _write(
                y_grad_ptr, grad_y, q, col, inside & last_owned, y_rest, y_leader
            )
        else:
            # A thread stores where it has loaded: the pointers, and so the layouts, are equal.
            tl.store(carry_ptr + col, grad_y, mask=inside)
        x_rest, x_leader = _write(x_grad_ptr, grad, p, col, inside & owned, x_rest, x_leader)
    _close(x_grad_ptr, x_rest, x_leader, owned)
    if last:
        _close(y_grad_ptr, y_rest, y_leader, last_owned)


@jit
def _write(grad_ptr, grad, p, col, mask, rest, leader):
    """Stores a tile; the sum without a class of more than half of the row, and which that is."""
    leads = p > 0.5
    grad_to = grad.to(grad_ptr.dtype.element_ty)
    # Not read again: what is should stay in the cache.
    tl.store(grad_ptr + col, grad_to, mask=mask, eviction_policy="evict_first")
    return rest + tl.where(leads, 0.0, grad), tl.where(leads, col, leader)


@jit
def _close(grad_ptr, rest, leader, owned):
    """Gives that class what makes the row sum to 0, over what another thread stored there."""
    leader = tl.max(leader, 0)
    rest = -tl.sum(rest, 0)
    tl.debug_barrier()
    tl.store(grad_ptr + leader, rest.to(grad_ptr.dtype.element_ty), mask=(leader >= 0) & owned)


@kernel
def path_tiles_kernel(
    logits_ptr,  # [N, B, C]
    upstream_ptr,  # [E, B]
    value_ptr,  # [E, B], or [B, E]
    grad_ptr,  # [N, B, C], contiguous
    kept_ptr,
    N,
    B,
    stride_n,
    stride_b,
    stride_c,
    stride_ue,
    stride_ub,
    inv_t,
    a,
    b,
    p_limit,
    q_limit,
    carry_ptr,  # [programs, C], fp32: the gradient of a row as far as its first edge gives it
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
    KIND: tl.constexpr,
    KEPT: tl.constexpr,
    VALUE: tl.constexpr,
    FISHER: tl.constexpr,
    GRAD: tl.constexpr,
    UPSTREAM: tl.constexpr,
    MEAN: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows longer than a tile, one at a time; arguments as of `path_rows_kernel`.

    A program that does not own the first point begins one edge before its own. The last edge of
    the path writes both its gradients, so that a pair of rows leaves nothing in `carry_ptr`.
    """
    if WIDE:
        stride_c = tl.cast(stride_c, tl.int64)
    how = (inv_t, a, b, p_limit, q_limit)
    stride_n = tl.multiple_of(stride_n.to(tl.int64), ALIGNED)
    stride_b = tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    owned = tl.program_id(1) * SEGMENT
    start = tl.maximum(owned - 1, 0)
    end = tl.minimum(owned + SEGMENT, N - 1)
    carry_ptr += (tl.program_id(1) * tl.num_programs(0) + row) * C
    grad_ptr += row * C
    logits_ptr += row * stride_b + start.to(tl.int64) * stride_n
    read = row >= 0
    if KEPT:
        read = tl.load(kept_ptr + row) != 0
    x = _row(logits_ptr, stride_c, read, inv_t, C, BLOCK)
    for i in range(end - start):
        edge = start + i
        logits_ptr += stride_n
        y = _row(logits_ptr, stride_c, read, inv_t, C, BLOCK)
        shifted = edge < 0
        total, p_kl, q_kl = _sums(x, y, shifted, stride_c, read, how, KIND, FISHER, C, BLOCK)
        value = _finish_value(total, p_kl, q_kl, shifted, how, KIND, FISHER)
        if VALUE:
            if edge >= owned:
                if VALUE == 1:
                    tl.store(value_ptr + edge.to(tl.int64) * B + row, value)
                else:
                    tl.store(value_ptr + row * (N - 1) + edge, value / B)
        if GRAD:
            if KIND < 2:
                shifted = _far_apart(value, how, KIND)
                if shifted:
                    _, p_kl, q_kl = _sums(
                        x, y, shifted, stride_c, read, how, KIND, FISHER, C, BLOCK
                    )
            weight = inv_t
            if UPSTREAM:
                upstream = upstream_ptr + edge.to(tl.int64) * stride_ue + row * stride_ub
                weight *= tl.load(upstream, mask=read, other=0.0)
            if MEAN:
                weight /= B
            _sweep_grad(
                grad_ptr + edge.to(tl.int64) * B * C,
                grad_ptr + (edge + 1).to(tl.int64) * B * C,
                carry_ptr,
                x,
                y,
                weight,
                p_kl,
                q_kl,
                shifted,
                i > 0,
                edge >= owned,
                edge == N - 2,
                owned + SEGMENT >= N,
                stride_c,
                read,
                how,
                KIND,
                C,
                BLOCK,
            )
        x = y
