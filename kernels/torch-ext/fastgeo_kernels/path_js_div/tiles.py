"""The path divergence where a row is swept in tiles: log-sum-exp, sums, gradient."""

from __future__ import annotations

from ..launching import jit, tl
from .terms import (
    _exp,
    _finish_value,
    _hellinger_term,
    _load,
    _log_ratio,
    _terms,
    kernel,
)


@jit
def _tile(row_ptr, start, stride_c, C: tl.constexpr, TILE: tl.constexpr):
    """[TILE] logits of one row from class `start` on, and which classes they are."""
    col = start + tl.arange(0, TILE)
    floor = tl.where(col < C, -1e30, -3e38)
    return _load(row_ptr + col * stride_c, col < C, floor), col


@jit
def _row(row_ptr, stride_c, C: tl.constexpr, INV_T: tl.constexpr, TILE: tl.constexpr):
    """A row as the sweeps below take it: its pointer, its largest logit, log sum exp(x / T) without
    that, and 1 / sum."""
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
    return row_ptr, best, tl.log(total), 1.0 / total


@jit
def _edge_tile(x, y, start, stride_c, C: tl.constexpr, INV_T: tl.constexpr, TILE: tl.constexpr):
    """p, q and d = log p - log q of two rows in a tile, and which classes they are."""
    x_ptr, x_top, x_lse, x_inv = x
    y_ptr, y_top, y_lse, y_inv = y
    x, col = _tile(x_ptr, start, stride_c, C, TILE)
    y, _ = _tile(y_ptr, start, stride_c, C, TILE)
    p = _exp((x - x_top) * INV_T) * x_inv
    q = _exp((y - y_top) * INV_T) * y_inv
    return p, q, _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T), col


@jit
def _sums(
    x,
    y,
    shift,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    FISHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of the value's terms, KL(p || m) and KL(q || m) of two rows, the two less `shift`."""
    total = tl.zeros([TILE], tl.float32)
    kl_p = tl.zeros([TILE], tl.float32)
    kl_q = tl.zeros([TILE], tl.float32)
    # Backwards: what the sweep before this one read last is still in the cache.
    for back in range(0, C, TILE):
        p, q, d, _ = _edge_tile(x, y, (C - 1) // TILE * TILE - back, stride_c, C, INV_T, TILE)
        log_p, log_q, h = _terms(d, p, q, shift)
        if FISHER:
            h = _hellinger_term(d, p, q)
        total += h
        kl_p += p * log_p
        kl_q += q * log_q
    return tl.sum(total, 0), tl.sum(kl_p, 0), tl.sum(kl_q, 0)


@jit
def _sweep_grad(
    x_grad_ptr,
    y_grad_ptr,
    carry_ptr,
    x,
    y,
    weight,
    kl_p,
    kl_q,
    shift,
    begun,
    owned,
    last,
    last_owned,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds what the edge (x, y) gives to both its rows. x, if `begun` in `carry_ptr`, is then done,
    and y where no edge follows: they are written if owned. Else y is left in `carry_ptr`."""
    x_rest = tl.zeros([TILE], tl.float32)
    y_rest = tl.zeros([TILE], tl.float32)
    x_leader = tl.full([TILE], -1, tl.int32)
    y_leader = tl.full([TILE], -1, tl.int32)
    for start in range(0, C, TILE):
        p, q, d, col = _edge_tile(x, y, start, stride_c, C, INV_T, TILE)
        inside = col < C
        grad = tl.load(carry_ptr + col, mask=inside & begun, other=0.0)
        log_p, log_q, _ = _terms(d, p, q, shift)
        grad_y = q * tl.fma(log_q, weight, -weight * kl_q)
        grad = tl.fma(p, tl.fma(log_p, weight, -weight * kl_p), grad)
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
    N,
    B,
    stride_n,
    stride_b,
    stride_c,
    stride_ue,
    stride_ub,
    carry_ptr,  # [programs, C], fp32: the gradient of a row as far as its first edge gives it
    ALIGNED: tl.constexpr,
    WIDE: tl.constexpr,
    C: tl.constexpr,
    INV_T: tl.constexpr,
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
    stride_n = tl.multiple_of(stride_n.to(tl.int64), ALIGNED)
    stride_b = tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
    row = tl.program_id(0).to(tl.int64)
    owned = tl.program_id(1) * SEGMENT
    start = tl.maximum(owned - 1, 0)
    end = tl.minimum(owned + SEGMENT, N - 1)
    carry_ptr += (tl.program_id(1) * tl.num_programs(0) + row) * C
    grad_ptr += row * C
    logits_ptr += row * stride_b + start.to(tl.int64) * stride_n
    x = _row(logits_ptr, stride_c, C, INV_T, BLOCK)
    for i in range(end - start):
        edge = start + i
        logits_ptr += stride_n
        y = _row(logits_ptr, stride_c, C, INV_T, BLOCK)
        total, kl_p, kl_q = _sums(x, y, 0.0, stride_c, C, INV_T, FISHER, BLOCK)
        if VALUE:
            value = _finish_value(total, kl_p, kl_q, 0.0, FISHER)
            if edge >= owned:
                if VALUE == 1:
                    tl.store(value_ptr + edge.to(tl.int64) * B + row, value)
                else:
                    tl.store(value_ptr + row * (N - 1) + edge, value / B)
        if GRAD:
            shift = tl.where(kl_p + kl_q > 1.0, 0.6931471805599453, 0.0)
            if shift > 0.0:
                _, kl_p, kl_q = _sums(x, y, shift, stride_c, C, INV_T, FISHER, BLOCK)
            weight = 0.5 * INV_T
            if UPSTREAM:
                weight *= tl.load(upstream_ptr + edge.to(tl.int64) * stride_ue + row * stride_ub)
            if MEAN:
                weight /= B
            _sweep_grad(
                grad_ptr + edge.to(tl.int64) * B * C,
                grad_ptr + (edge + 1).to(tl.int64) * B * C,
                carry_ptr,
                x,
                y,
                weight,
                kl_p,
                kl_q,
                shift,
                i > 0,
                edge >= owned,
                edge == N - 2,
                owned + SEGMENT >= N,
                stride_c,
                C,
                INV_T,
                BLOCK,
            )
        x = y
