"""What the kernels of the path divergence compute for each class, and how they close a row."""

from __future__ import annotations

from .launching import jit, tl

# Numbers that change from call to call neither recompile nor turn into constants.
kernel = jit(do_not_specialize=["N", "B", "stride_n", "stride_b", "stride_ue", "stride_ub"])


@jit
def _load(pointers, mask, floor):
    """Logits as fp32. Masked classes (-inf) and the tile's padding become finite, so that every
    difference of two of them is; `floor` is lower in the padding, which then never counts."""
    x = tl.load(pointers, mask=mask, other=-float("inf")).to(tl.float32)
    return tl.where(x < floor, floor, x)


@jit
def _exp(x):
    """exp as one hardware instruction; below 1e-38 it is 0."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def _softmax(x, INV_T: tl.constexpr):
    """[ROWS, BLOCK] -> the largest logit, log sum exp(x / T) without it, and p."""
    top = tl.max(x, 1, keep_dims=True)
    e = _exp((x - top) * INV_T)
    total = tl.sum(e, 1, keep_dims=True)
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
def _terms(d, p, q):
    """log(max(p, q) / m), the same less log 2, (p + q) h / 2 and p - q, none by cancellation."""
    a = tl.abs(d)
    near = a < 1.0
    u = d * d
    tanh = tl.fma(u, 3.34668094e-05, -4.13953712e-04)
    tanh = tl.fma(u, tanh, 4.16399354e-03)
    tanh = tl.fma(u, tanh, -4.16663367e-02)
    tanh = tl.fma(u, tanh, 4.99999993e-01) * d  # tanh(d / 2)
    log_cosh = tl.fma(u, 1.74241695e-06, -2.60234042e-05)
    log_cosh = tl.fma(u, log_cosh, 3.47107716e-04)
    log_cosh = tl.fma(u, log_cosh, -5.20831922e-03)
    log_cosh = tl.fma(u, log_cosh, 0.125) * u  # log cosh(d / 2)
    e = _exp(-a)
    log1p = tl.fma(e, 5.26536976e-02, -1.30238778e-01)
    log1p = tl.fma(e, log1p, 1.91842718e-01)
    log1p = tl.fma(e, log1p, -2.49017146e-01)
    log1p = tl.fma(e, log1p, 3.33275586e-01)
    log1p = tl.fma(e, log1p, -4.99998710e-01)
    log1p = tl.fma(e, log1p, 9.99999995e-01)  # log(1 + e) / e
    larger = tl.where(near, tl.fma(a, 0.5, -log_cosh), tl.fma(-e, log1p, 0.6931471805599453))
    below = tl.where(near, larger - 0.6931471805599453, -e * log1p)
    log_p = larger + tl.minimum(d, 0.0)
    log_q = larger - tl.maximum(d, 0.0)
    h = tl.where(near, (p + q) * tl.fma(0.5 * d, tanh, -log_cosh), p * log_p + q * log_q)
    return larger, below, h, tl.where(near, (p + q) * tanh, p - q)


@jit
def _alone(d, p, q):
    """p, or q, on classes that the other lacks; above 1 in sum, log(p / m) goes less log 2."""
    return tl.where(d >= 1.0, p, tl.where(d <= -1.0, q, 0.0))


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
def _finish_value(total, gap, FISHER: tl.constexpr):
    """Takes off the square of the row's shift; selects instead of max, which would hide a NaN."""
    gap = 0.5 * gap
    value = total - gap * gap
    if not FISHER:
        value = tl.where(value > 1.3862943611198906, 1.3862943611198906, value) * 0.5
    return tl.where(value < 0.0, 0.0, value)


@jit
def _close_row(grad, p):
    """Gives the class that holds more than half of the row what makes the row sum to 0."""
    leads = p > 0.5
    rest = tl.sum(tl.where(leads, 0.0, grad), 1, keep_dims=True)
    return tl.where(leads, -rest, grad)
