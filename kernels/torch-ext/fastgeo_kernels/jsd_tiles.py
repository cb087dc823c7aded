"""The path divergence where a row is swept in tiles: log-sum-exp, sums, gradient."""

from __future__ import annotations

from .jsd_terms import (
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
    shift,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    FISHER: tl.constexpr,
    TILE: tl.constexpr,
):
    """Sums of the value's terms, KL(p || m) and KL(q || m) of one edge, the two less `shift`."""
    total = tl.zeros([TILE], tl.float32)
    kl_p = tl.zeros([TILE], tl.float32)
    kl_q = tl.zeros([TILE], tl.float32)
    # Backwards: what the sweep before this one read last is still in the cache.
    for back in range(0, C, TILE):
        start = (C - 1) // TILE * TILE - back
        x, _ = _tile(x_ptr, start, stride_c, C, TILE)
        y, _ = _tile(y_ptr, start, stride_c, C, TILE)
        p = _exp((x - x_top) * INV_T) * x_inv
        q = _exp((y - y_top) * INV_T) * y_inv
        d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T)
        log_p, log_q, h = _terms(d, p, q, shift)
        if FISHER:
            h = _hellinger_term(d, p, q)
        total += h
        kl_p += p * log_p
        kl_q += q * log_q
    return tl.sum(total, 0), tl.sum(kl_p, 0), tl.sum(kl_q, 0)


@jit
def _sweep_grad(
    grad_ptr,
    carry_ptr,
    x_ptr,
    y_ptr,
    x_top,
    y_top,
    x_lse,
    y_lse,
    x_inv,
    y_inv,
    weight,
    kl_p,
    kl_q,
    shift,
    begun,
    owned,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds what the edge (x, y) gives to both its rows: x, if `begun` in `carry_ptr`, is done and
    written if `owned`; y is left there."""
    rest = tl.zeros([TILE], tl.float32)
    leader = tl.full([TILE], -1, tl.int32)
    for start in range(0, C, TILE):
        x, col = _tile(x_ptr, start, stride_c, C, TILE)
        y, _ = _tile(y_ptr, start, stride_c, C, TILE)
        inside = col < C
        grad = tl.load(carry_ptr + col, mask=inside & begun, other=0.0)
        p = _exp((x - x_top) * INV_T) * x_inv
        q = _exp((y - y_top) * INV_T) * y_inv
        d = _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T)
        log_p, log_q, _ = _terms(d, p, q, shift)
        # A thread stores where it has loaded: the pointers, and with them the layouts, are equal.
        grad_y = q * tl.fma(log_q, weight, -weight * kl_q)
        tl.store(carry_ptr + col, grad_y, mask=inside)
        grad = tl.fma(p, tl.fma(log_p, weight, -weight * kl_p), grad)
        rest, leader = _write(grad_ptr, grad, p, col, inside & owned, rest, leader)
    _close(grad_ptr, rest, leader, owned)


@jit
def _sweep_last(
    grad_ptr,
    carry_ptr,
    x_ptr,
    x_top,
    x_inv,
    stride_c,
    C: tl.constexpr,
    INV_T: tl.constexpr,
    TILE: tl.constexpr,
):
    """Writes the gradient of a row without a further edge."""
    rest = tl.zeros([TILE], tl.float32)
    leader = tl.full([TILE], -1, tl.int32)
    for start in range(0, C, TILE):
        x, col = _tile(x_ptr, start, stride_c, C, TILE)
        grad = tl.load(carry_ptr + col, mask=col < C, other=0.0)
        p = _exp((x - x_top) * INV_T) * x_inv
        rest, leader = _write(grad_ptr, grad, p, col, col < C, rest, leader)
    _close(grad_ptr, rest, leader, True)


@jit
def _write(grad_ptr, grad, p, col, mask, rest, leader):
    """Stores a tile; the sum without a class of more than half of the row, and which that is."""
    leads = p > 0.5
    tl.store(grad_ptr + col, grad.to(grad_ptr.dtype.element_ty), mask=mask)
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
    carry_ptr,  # [programs, C], fp32: the gradient of a row as far as its first edge gives it
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
    carry_ptr += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * C
    for i in range(EDGES):
        edge = first + i
        y_ptr = logits_ptr + tl.minimum(edge + 1, N - 1).to(tl.int64) * stride_n
        is_edge = (edge >= 0) & (edge < N - 1)
        y_top, y_lse, y_inv = _sweep_lse(y_ptr, stride_c, C, INV_T, BLOCK)
        shift = x_lse * 0
        total, kl_p, kl_q = _sweep_edge(
            x_ptr,
            y_ptr,
            x_top,
            y_top,
            x_lse,
            y_lse,
            x_inv,
            y_inv,
            0.0,
            stride_c,
            C,
            INV_T,
            FISHER,
            BLOCK,
        )
        value = _finish_value(total, kl_p, kl_q, shift, FISHER)
        if GRAD:
            if kl_p + kl_q > 1.0:
                shift += 0.6931471805599453
                _, kl_p, kl_q = _sweep_edge(
                    x_ptr,
                    y_ptr,
                    x_top,
                    y_top,
                    x_lse,
                    y_lse,
                    x_inv,
                    y_inv,
                    shift,
                    stride_c,
                    C,
                    INV_T,
                    FISHER,
                    BLOCK,
                )
        if is_edge & (edge >= first + HALO):
            if VALUE == 1:
                tl.store(value_ptr + edge.to(tl.int64) * B + row, value)
            if VALUE == 2:
                tl.store(value_ptr + row * (N - 1) + edge, value / B)
        if GRAD:
            weight = tl.where(is_edge, 0.5 * INV_T, 0.0)
            if UPSTREAM:
                weights = tl.minimum(tl.maximum(edge, 0), N - 2).to(tl.int64) * stride_ue
                weights += row * stride_ub
                weight *= tl.load(upstream_ptr + weights)
            if MEAN:
                weight /= B
            _sweep_grad(
                grad_ptr + tl.maximum(edge, 0).to(tl.int64) * B * C,
                carry_ptr,
                x_ptr,
                y_ptr,
                x_top,
                y_top,
                x_lse,
                y_lse,
                x_inv,
                y_inv,
                weight,
                kl_p,
                kl_q,
                shift,
                i > 0,
                (i >= HALO) & (edge < N),
                stride_c,
                C,
                INV_T,
                BLOCK,
            )
        x_ptr, x_top, x_lse, x_inv = y_ptr, y_top, y_lse, y_inv
    if GRAD and not HALO:
        last = grad_ptr + (first + EDGES).to(tl.int64) * B * C
        _sweep_last(last, carry_ptr, x_ptr, x_top, x_inv, stride_c, C, INV_T, BLOCK)
