"""The path divergence where registers hold a row: logits are read and gradients written once.

Rows are tuples of tiles of equal size, their pieces.
"""

from __future__ import annotations

from ..launching import jit, tl
from .terms import (
    _finish_value,
    _hellinger_term,
    _load,
    _log_ratio,
    _near_terms,
    _offset,
    _rounding_shows,
    _terms,
    kernel,
)


@jit
def _read(pointers, cols, stride_c, read, C: tl.constexpr):
    """Pieces of classes `cols` of the rows that start there."""
    x = ()
    for k in tl.static_range(len(cols)):
        floor = tl.where(cols[k] < C, -1e30, -3e38)
        x = x + (_load(pointers + cols[k] * stride_c, read & (cols[k] < C), floor),)
    return x


@jit
def _max(pieces):
    top = pieces[0]
    for k in tl.static_range(1, len(pieces)):
        top = tl.maximum(top, pieces[k])
    return tl.max(top, 1, keep_dims=True)


@jit
def _sum(pieces):
    total = pieces[0]
    for k in tl.static_range(1, len(pieces)):
        total += pieces[k]
    return tl.sum(total, 1, keep_dims=True)


@jit
def _dot(left, right):
    total = left[0] * right[0]
    for k in tl.static_range(1, len(left)):
        total = tl.fma(left[k], right[k], total)
    return tl.sum(total, 1, keep_dims=True)


@jit
def _softmax(x, inv_t):
    """The largest logit of each row, log sum exp(x / T) without it, and p."""
    top = _max(x)
    e, p = (), ()
    for k in tl.static_range(len(x)):
        e = e + (tl.exp2((x[k] - top) * (inv_t * 1.4426950408889634)),)
    total = _sum(e)
    for k in tl.static_range(len(x)):
        p = p + (e[k] * (1.0 / total),)
    return top, tl.log(total), p


@jit
def _half_differences(x, y, offset, cols, inv_t, C: tl.constexpr):
    """Half of log p - log q, but for the rounding of x - y, which mostly has none."""
    z = ()
    for k in tl.static_range(len(x)):
        half = tl.fma(x[k] - y[k], 0.5 * inv_t, -0.5 * offset)
        z = z + (tl.where(cols[k] < C, half, 0.0),)
    return z


@jit
def _largest(z):
    """The largest |z| of all rows, which is one number."""
    size = ()
    for k in tl.static_range(len(z)):
        size = size + (tl.abs(z[k]),)
    return tl.max(tl.max(_max(size), 1), 0)


@jit
def _near_sums(z, p, q):
    """p log(p / m) and q log(q / m), their sums and that of the value's terms, by `_near_terms`."""
    p_log, q_log, weight, h = (), (), (), ()
    for k in tl.static_range(len(z)):
        one, other, both, term = _near_terms(z[k], p[k], q[k])
        p_log, q_log = p_log + (one,), q_log + (other,)
        weight, h = weight + (both,), h + (term,)
    return p_log, q_log, _sum(p_log), _sum(q_log), _dot(weight, h)


@jit
def _exact_sums(
    x, y, p, q, x_top, y_top, x_lse, y_lse, how, KIND: tl.constexpr, FISHER: tl.constexpr
):
    """The same of any rows, and whether the logs are less their limits: where most of p and of q is
    on classes that the other lacks."""
    least, p_log, q_log, h = (), (), (), ()
    for k in tl.static_range(len(p)):
        least = least + (tl.minimum(p[k], q[k]),)
    shifted = _sum(least) < 0.25
    for k in tl.static_range(len(p)):
        d = _log_ratio(x[k], y[k], x_top, y_top, x_lse, y_lse, how[0])
        one, other, term = _terms(d, p[k], q[k], shifted, how, KIND)
        if FISHER:
            term = _hellinger_term(d, p[k], q[k])
        p_log, q_log, h = p_log + (one,), q_log + (other,), h + (term,)
    return p_log, q_log, _sum(p_log), _sum(q_log), _sum(h), shifted


@jit
def _write(pointers, grad, p, cols, row_ok, C: tl.constexpr):
    """What the gradient of a row sums to is what rounding left in its two KL divergences."""
    left = _sum(grad)
    for k in tl.static_range(len(p)):
        closed = tl.fma(-p[k], left, grad[k]).to(pointers.dtype.element_ty)
        tl.store(pointers + cols[k], closed, mask=row_ok & (cols[k] < C))


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
    AT_ONCE: tl.constexpr,  # of these, in a round of its loop
    SEGMENT: tl.constexpr,  # points that a program owns
    HALO: tl.constexpr,  # whether it begins one edge before its first point
    ROWS: tl.constexpr,
    PIECE: tl.constexpr,  # classes of a tile
):
    """Of each point [ROWS, PIECE] tiles, as many as have C classes. Of up to 16 classes a thread
    holds whole rows, whose sums need no other one."""
    how = (inv_t, a, b, p_limit, q_limit)
    start = tl.program_id(0).to(tl.int64) * ROWS
    first = tl.program_id(1) * SEGMENT - HALO
    local = tl.arange(0, ROWS)
    row = start + local
    row_ok = local >= 0 if ROWS == 1 else row < B  # no program is one too many
    read_row = row_ok
    if KEPT:
        read_row = row_ok & (tl.load(kept_ptr + row, mask=row_ok, other=0) != 0)
    read = read_row[:, None]
    cols = ()
    for lowest in tl.static_range(0, C, PIECE):
        cols = cols + (lowest + tl.arange(0, PIECE)[None, :],)
    stride_n = tl.multiple_of(stride_n.to(tl.int64), ALIGNED)
    grad_ptr += start * C + local[:, None] * C
    if WIDE:
        local = local.to(tl.int64)
        stride_c = tl.cast(stride_c, tl.int64)
    logits_ptr += start * tl.multiple_of(stride_b.to(tl.int64), ALIGNED)
    # A hint would not survive on a 32-bit argument; this does.
    logits_ptr += local[:, None] * (stride_b // ALIGNED * ALIGNED)

    x_ptr = logits_ptr + tl.maximum(first, 0).to(tl.int64) * stride_n
    x = _read(x_ptr, cols, stride_c, read, C)
    y_ptr = logits_ptr + (first + 1).to(tl.int64) * stride_n
    y = _read(y_ptr, cols, stride_c, read, C)
    x_top, x_lse, p = _softmax(x, inv_t)
    grad = ()
    for k in tl.static_range(len(p)):
        grad = grad + (tl.zeros_like(p[k]),)
    share = 1.0 / B
    unit = inv_t * share if MEAN else inv_t
    # Of a point by itself the first edge only begins its gradient; unrolled, nothing else is left.
    for begin in (tl.static_range if EDGES == 2 else tl.range)(0, EDGES, AT_ONCE):
        for after in tl.static_range(AT_ONCE):
            i = begin + after
            edge = first + i
            y_top, y_lse, q = _softmax(y, inv_t)
            if KIND == 0 and not FISHER:
                p_log, q_log = p, q
                p_kl = tl.zeros_like(x_lse)
                q_kl = tl.zeros_like(x_lse)
                total = tl.zeros_like(x_lse)
                shifted = total > 0.0
                offset = _offset(x_top, y_top, x_lse, y_lse, inv_t)
                z = _half_differences(x, y, offset, cols, inv_t, C)
                near = _largest(z) < 0.5
                if near:
                    p_log, q_log, p_kl, q_kl, total = _near_sums(z, p, q)
                    shows = _rounding_shows(total, offset, x_top, y_top, x_lse, y_lse)
                    near = tl.max(tl.max(shows.to(tl.int32), 1), 0) == 0
                if not near:
                    # Read again, so that no registers keep it.
                    x = _read(x_ptr, cols, stride_c, read, C)
                    p_log, q_log, p_kl, q_kl, total, shifted = _exact_sums(
                        x, y, p, q, x_top, y_top, x_lse, y_lse, how, KIND, FISHER
                    )
            else:
                p_log, q_log, p_kl, q_kl, total, shifted = _exact_sums(
                    x, y, p, q, x_top, y_top, x_lse, y_lse, how, KIND, FISHER
                )
            # The row after next is on its way while this edge's gradient is computed.
            x_ptr = y_ptr
            y_ptr = logits_ptr + tl.minimum(edge + 2, N - 1).to(tl.int64) * stride_n
            following = _read(y_ptr, cols, stride_c, read, C)
            is_edge = (not HALO) or ((edge >= 0) & (edge < N - 1))
            if VALUE:
                value = _finish_value(total, p_kl, q_kl, shifted, how, KIND, FISHER)
                value = tl.reshape(value, [ROWS])
                if (not HALO) or (is_edge & (i > 0)):
                    if VALUE == 1:
                        tl.store(value_ptr + edge.to(tl.int64) * B + row, value, mask=row_ok)
                    else:
                        mean = tl.sum(tl.where(row_ok, value, 0.0), 0) * share
                        tl.store(value_ptr + tl.program_id(0).to(tl.int64) * (N - 1) + edge, mean)
            if GRAD:
                scale = tl.where(is_edge, unit, 0.0) if HALO else unit
                if UPSTREAM:
                    weights = tl.minimum(tl.maximum(edge, 0), N - 2).to(tl.int64) * stride_ue
                    weights = weights + row * stride_ub
                    scale *= tl.load(upstream_ptr + weights, mask=read_row, other=0.0)[:, None]
                done, grad_of_y = (), ()
                for k in tl.static_range(len(p)):
                    done = done + (tl.fma(tl.fma(-p[k], p_kl, p_log[k]), scale * a, grad[k]),)
                    grad_of_y = grad_of_y + (tl.fma(-q[k], q_kl, q_log[k]) * (scale * b),)
                if (not HALO) or ((i > 0) & (edge < N)):
                    here = grad_ptr + edge.to(tl.int64) * B * C
                    _write(here, done, p, cols, row_ok[:, None], C)
                grad = grad_of_y
            x, x_top, x_lse, p = y, y_top, y_lse, q
            y = following
    if GRAD and not HALO:
        last = grad_ptr + (first + EDGES).to(tl.int64) * B * C
        _write(last, grad, p, cols, row_ok[:, None], C)
