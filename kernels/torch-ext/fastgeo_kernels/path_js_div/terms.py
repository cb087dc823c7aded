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
def _softmax(x, INV_T: tl.constexpr, AXIS: tl.constexpr):
    """Classes along `AXIS` -> the largest logit, log sum exp(x / T) without it, and p."""
    top = tl.max(x, AXIS, keep_dims=True)
    e = _exp((x - top) * INV_T)
    total = tl.sum(e, AXIS, keep_dims=True)
    return top, tl.log(total), e * (1.0 / total)


@jit
def _exact_difference(x, y):
    """x - y, and the rounding error of it (Knuth's two-sum)."""
    diff = x - y
    y_seen = x - diff
    return diff, (x - (diff + y_seen)) + (y_seen - y)


@jit
def _log_ratio(x, y, x_top, y_top, x_lse, y_lse, INV_T: tl.constexpr):
    """d = log p - log q."""
    diff, lost = _exact_difference(x, y)
    top_diff, top_lost = _exact_difference(x_top, y_top)
    return ((diff - top_diff) + lost) * INV_T - ((x_lse - y_lse) + top_lost * INV_T)


@jit
def _terms(d, p, q, shift):
    """log(p / m), log(q / m), both less `shift` (0 or log 2), and, where that is 0, (p + q) h: none
    by cancellation."""
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
    log_p = larger + tl.minimum(d, 0.0)
    log_q = larger - tl.maximum(d, 0.0)
    return log_p, log_q, tl.where(near, (p + q) * h, p * log_p + q * log_q)


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
def _finish_value(total, kl_p, kl_q, shift, FISHER: tl.constexpr):
    """Takes off the square of the row's shift, which of near-equal rows is KL(p || m) - KL(q || m)
    to the third order in d. Selects instead of max, which would hide a NaN."""
    gap = 0.5 * (kl_p - kl_q)
    value = tl.where(total < 1e-6, total - gap * gap, total)
    if not FISHER:
        value = tl.where(shift > 0.0, kl_p + kl_q + 1.3862943611198906, value)
        value = tl.where(value > 1.3862943611198906, 1.3862943611198906, value) * 0.5
    return tl.where(value < 0.0, 0.0, value)


@jit
def _close_row(grad, p, AXIS: tl.constexpr):
    """Gives the class that holds more than half of the row what makes the row sum to 0."""
    leads = p > 0.5
    rest = tl.sum(tl.where(leads, 0.0, grad), AXIS, keep_dims=True)
    return tl.where(leads, -rest, grad)
