"""The path divergence where a row is swept in tiles: log-sum-exp, sums, gradient."""

from __future__ import annotations

from .jsd_terms import (
    _alone,
    _exp,
    _finish_value,
    _hellinger_term,
    _load,
    _log_ratio,
    _terms,
    kernel,
)
from .launching import jit, tl


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
        tl.store(grad_ptr + col, grad, mask=(col < C) & (leads == 0))  # NaN does not lead
    leader = tl.max(leader, 0)
    rest = -tl.sum(rest, 0)
    tl.store(grad_ptr + leader, rest.to(grad_ptr.dtype.element_ty), mask=leader >= 0)


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
    """Rows longer than a tile, one at a time; arguments as of `path_rows_kernel`."""
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
