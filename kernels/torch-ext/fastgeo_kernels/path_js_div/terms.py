"""What the kernels of the path divergence compute for each class, and how they close a row."""

from __future__ import annotations

from ..launching import jit, tl

# Numbers that change from call to call neither recompile nor turn into constants.
kernel = jit(do_not_specialize=["N", "B", "stride_n", "stride_b", "stride_ue", "stride_ub"])


@jit
def _load(pointers, mask, floor):
    """Logits as fp32. Masked classes (-inf) and the tile's padding become finite, so that every
    difference of two of them is; `floor` is lower in the padding, which then never counts."""
    x = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)
    return tl.maximum(x, floor, propagate_nan=tl.PropagateNan.ALL)


@jit
def _exp(x):
    """exp as one hardware instruction; below 1e-38 it is 0."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _softmax(x, inv_t, AXIS: tl.constexpr):
    """Classes along `AXIS` -> the largest logit, log sum exp(x / T) without it, and p."""
    top = tl.max(x, AXIS, keep_dims=True)
    e = tl.exp2((x - top) * (inv_t * 1.4426950408889634))
    total = tl.sum(e, AXIS, keep_dims=True)
    return top, tl.log(total), e * (1.0 / total)


@jit
def _exact_difference(x, y):
    """x - y, and the rounding error of it (Knuth's two-sum)."""
    diff = x - y
    y_seen = x - diff
    return diff, (x - (diff + y_seen)) + (y_seen - y)


@jit
def _log_ratio(x, y, x_top, y_top, x_lse, y_lse, inv_t):
    """d = log p - log q."""
    diff, lost = _exact_difference(x, y)
    top_diff, top_lost = _exact_difference(x_top, y_top)
    offset = tl.fma(top_lost, inv_t, x_lse - y_lse)
    return tl.fma((diff - top_diff) + lost, inv_t, -offset)


@jit
def _offset(x_top, y_top, x_lse, y_lse, inv_t):
    """What of log p - log q all classes have in common."""
    diff, lost = _exact_difference(x_top, y_top)
    return tl.fma(diff, inv_t, tl.fma(lost, inv_t, x_lse - y_lse))


@jit
def _rounding_shows(size, offset, x_top, y_top, x_lse, y_lse):
    """Whether a row needs `_log_ratio`; `size` is at least a quarter of the mean square of d.

    Of each class x - y is exact or rounded by less than 2^-24 of |d| + |offset|: rows that are
    shifted by more than they differ lose digits. Where the leading class loses none, the others
    have lse of the row at most.
    """
    _, lost = _exact_difference(x_top, y_top)
    others = tl.where(lost == 0.0, tl.minimum(x_lse + y_lse, 1.0), 1.0)
    return others * offset * offset > 64.0 * size


@jit
def _near_terms(z, p, q):
    """`_terms` of z = d / 2 for beta = 1/2 and |z| < 1/2, where two polynomials are all: those of
    `_half_terms`, with a power of 4 for each of d^2. The value's terms are two factors."""
    u = z * z
    log_cosh = tl.fma(u, -2.25386549e-05 * 256, 3.44929821e-04 * 64)
    log_cosh = tl.fma(u, log_cosh, -5.20788366e-03 * 16)
    log_cosh = tl.fma(u, log_cosh, 1.24999986e-01 * 4)
    h = tl.fma(u, 1.49842075e-05 * 1024, -1.80939836e-04 * 256)
    h = tl.fma(u, h, 1.73488049e-03 * 64)
    h = tl.fma(u, h, -1.56248474e-02 * 16)
    h = tl.fma(u, h, 1.24999997e-01 * 4)
    p_log = p * tl.fma(-u, log_cosh, z)
    q_log = q * tl.fma(-u, log_cosh, -z)
    return p_log, q_log, (p + q) * u, h


@jit
def _terms(d, p, q, shifted, how, KIND: tl.constexpr):
    """p log(p / m), q log(q / m), the logs of shifted rows less their limits, and what the value
    sums over classes, which is no difference of larger numbers; of KL divergences p d and q - p.

    KIND is 0 for beta = 1/2, 1 between, 2 for KL(p || q) and 3 for KL(q || p); how is (1 / T, the
    weights a and b of p and q in m, -log a, -log b), of KL divergences (1 / T, 1, 1, 0, 0).
    """
    if KIND == 0:
        return _half_terms(d, p, q, tl.where(shifted, 0.6931471805599453, 0.0))
    elif KIND == 1:
        return _skew_terms(d, p, q, shifted, how)
    elif KIND == 2:
        return _kl_terms(d, p, q)
    else:
        q_log, p_log, term = _kl_terms(-d, q, p)
        return p_log, q_log, term


@jit
def _half_terms(d, p, q, shift):
    a = tl.abs(d)
    near = a < 1.0
    u = d * d
    log_cosh = tl.fma(u, -2.25386549e-05, 3.44929821e-04)
    log_cosh = tl.fma(u, log_cosh, -5.20788366e-03)
    log_cosh = tl.fma(u, log_cosh, 1.24999986e-01)
    log_cosh = tl.fma(u, log_cosh, shift)  # log cosh(d / 2) + shift
    h = tl.fma(u, 1.49842075e-05, -1.80939836e-04)
    h = tl.fma(u, h, 1.73488049e-03)
    h = tl.fma(u, h, -1.56248474e-02)
    h = tl.fma(u, h, 1.24999997e-01) * u  # d / 2 tanh(d / 2) - log cosh(d / 2)
    e = _exp(-a)
    log1p = tl.fma(e, 5.26536976e-02, -1.30238778e-01)
    log1p = tl.fma(e, log1p, 1.91842718e-01)
    log1p = tl.fma(e, log1p, -2.49017146e-01)
    log1p = tl.fma(e, log1p, 3.33275586e-01)
    log1p = tl.fma(e, log1p, -4.99998710e-01)
    log1p = tl.fma(e, log1p, 9.99999995e-01)  # log(1 + e) / e
    far = tl.fma(-e, log1p, 0.6931471805599453 - shift)
    larger = tl.where(near, tl.fma(a, 0.5, -log_cosh), far)  # log(max(p, q) / m)
    p_log = p * (larger + tl.minimum(d, 0.0))
    q_log = q * (larger - tl.maximum(d, 0.0))
    return p_log, q_log, tl.where(near, (p + q) * h, p_log + q_log)


@jit
def _cosh_and_sinh(u):
    """(cosh(z) - 1) / z^2 and (sinh(z) / z - 1) / z^2 of u = z^2 <= 1."""
    cosh = tl.fma(u, 2.53558762e-05, 1.38854363e-03)
    cosh = tl.fma(u, cosh, 4.16667351e-02)
    cosh = tl.fma(u, cosh, 4.99999998e-01)
    sinh = tl.fma(u, 2.02570000e-04, 8.33178000e-03)
    return cosh, tl.fma(u, sinh, 1.66666750e-01)


@jit
def _log1p(x):
    """log1p(x) = 2 atanh(s) and x - log1p(x) where |log1p(x)| <= 1."""
    s = x * (1.0 / (2.0 + x))
    u = s * s
    rest = tl.fma(u, 3.00498920e-01, 1.97099700e-01)
    rest = tl.fma(u, rest, 2.87770150e-01)
    rest = tl.fma(u, rest, 3.99942420e-01)
    rest = tl.fma(u, rest, 6.66666920e-01) * (u * s)
    return tl.fma(2.0, s, rest), tl.fma(s, x, -rest)


@jit
def _skew_terms(d, p, q, shifted, how):
    _, a, b, p_limit, q_limit = how
    size = tl.abs(d)
    near = size < 1.0
    above = d > 0.0
    u = d * d
    cosh, sinh = _cosh_and_sinh(u)
    odd = tl.fma(d * u, sinh, d)
    # Near: log(m / p) and log(m / q) are log1p of these.
    p_near = b * tl.fma(u, cosh, -odd)
    q_near = a * tl.fma(u, cosh, odd)
    # Far: the larger of p and q has the logarithm `limit` - log1p(rest), and the smaller one
    # -log1p(grown) as long as it is small, then that of the larger one less |d|.
    e = _exp(-size)
    small = tl.where(above, b, a)
    large = tl.where(above, a, b)
    limit = tl.where(above, p_limit, q_limit)
    rest = small / large * e
    grown = large * ((1.0 - e) / e)
    first, p_term = _log1p(tl.where(near, p_near, tl.minimum(rest, 1.5)))
    second, q_term = _log1p(tl.where(near, q_near, tl.minimum(grown, 1.5)))
    rest = tl.where(rest < 1.5, first, tl.log(1.0 + rest))
    larger = limit - rest
    smaller = tl.where(grown < 1.5, -second, larger - size)
    near_larger = -tl.where(above, first, second)
    near_smaller = -tl.where(above, second, first)
    larger = tl.where(near, near_larger, larger)
    smaller = tl.where(near, near_smaller, smaller)
    larger = tl.where(shifted, tl.where(near, larger - limit, -rest), larger)
    smaller -= tl.where(shifted, tl.where(above, q_limit, p_limit), 0.0)
    p_log = p * tl.where(above, larger, smaller)
    q_log = q * tl.where(above, smaller, larger)
    ap = a * p
    bq = b * q
    return p_log, q_log, tl.where(near, ap * p_term + bq * q_term, a * p_log + b * q_log)


@jit
def _kl_terms(d, p, q):
    """Of KL(p || q): p d, q - p, and p (d + expm1(-d))."""
    size = tl.abs(d)
    near = size < 1.0
    u = d * d
    cosh, sinh = _cosh_and_sinh(u)
    lost = tl.where(near, tl.fma(u, cosh, -tl.fma(size * u, sinh, size)), _exp(-size) - 1.0)
    lost *= tl.maximum(p, q)  # expm1(-|d|) max(p, q) = -|p - q|
    p_log = p * d
    q_log = tl.where(d > 0.0, lost, -lost)
    term = tl.where(near, p * (u * tl.fma(-d, sinh, cosh)), p_log + q_log)
    # A class that q lacks altogether; p d is finite, since -inf counts as a very low logit.
    return p_log, q_log, tl.where((d > 1e20) & (p > 0.0), float("inf"), term)


@jit
def _without_overlap(p, q, AXIS: tl.constexpr):
    """Whether most of p and of q is on classes that the other lacks."""
    return tl.sum(tl.minimum(p, q), AXIS, keep_dims=True) < 0.25


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
def _finish_value(total, p_kl, q_kl, shifted, how, KIND: tl.constexpr, FISHER: tl.constexpr):
    """Takes off the square of the row's shift in d, which of near-equal rows shows in the two sums.
    Selects instead of max, which would hide a NaN."""
    if KIND == 0:
        gap = 0.5 * (p_kl - q_kl)
        value = tl.where(total < 1e-6, total - gap * gap, total)
        if not FISHER:
            value = tl.where(shifted, p_kl + q_kl + 1.3862943611198906, value)
            value = tl.where(value > 1.3862943611198906, 1.3862943611198906, value) * 0.5
    elif KIND == 1:
        _, a, b, p_limit, q_limit = how
        ab = a * b
        gap = a / b * p_kl - b / a * q_kl
        value = tl.where(total < 2e-6 * ab, total - 0.5 * ab * (gap * gap), total)
        most = a * p_limit + b * q_limit
        value = tl.where(shifted, a * p_kl + b * q_kl + most, value)
        value = tl.where(value > most, most, value)
    else:
        gap = q_kl if KIND == 2 else p_kl
        value = tl.where(total < 2e-6, total - 0.5 * gap * gap, total)
    return tl.where(value < 0.0, 0.0, value)


@jit
def _far_apart(value, how, KIND: tl.constexpr):
    """Whether a row's logs are to be taken without their limits, by its value: near the largest."""
    if KIND == 0:
        return value > 0.5
    else:
        _, a, b, p_limit, q_limit = how
        return value > 0.72 * (a * p_limit + b * q_limit)


@jit
def _close_row(grad, p, AXIS: tl.constexpr):
    """Gives the class that holds more than half of the row what makes the row sum to 0."""
    leads = p > 0.5
    rest = tl.sum(tl.where(leads, 0.0, grad), AXIS, keep_dims=True)
    return tl.where(leads, -rest, grad)
