"""The plain PyTorch of every operation: the oracle, and what runs without Triton.

Divergence of neighbouring rows p = softmax(x), q = softmax(y), m = (p + q) / 2, written with
d = log p - log q = (x - y) - (lse_x - lse_y):

    log(p / m) = s + min(d, 0),  log(q / m) = s + min(-d, 0),  s = -log1p(expm1(-|d|) / 2)
    JSD        = 1/4 sum (p + q) h,   h = d tanh(d / 2) - 2 log cosh(d / 2) >= 0
    dJSD / dx  = 1/2 p (log(p / m) - KL(p || m))

Every term of the sum is non-negative and nothing in it is the difference of two larger numbers, so
the value is never negative, exactly 0 for equal rows, and never NaN for finite logits. JSD: Lin,
"Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991). Path energy
and lengths: Tan et al., "Geodesic Mode Connectivity", ICLR 2023 Tiny Papers, Eqs. 1 and 2.
"""

from __future__ import annotations

import math
from typing import Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LN2 = math.log(2.0)
LOWEST = -1e30  # what a logit of -inf counts as
CHUNK = 1 << 16  # numbers of a slice of the batch; a handful of such tensors fit a core's L2 cache

# tanh(z / 2) / z and log(cosh(z / 2)) / z^2 as polynomials of z^2 on [0, 1], least relative error
# (1.3e-8 and 2.2e-9); the highest coefficient first.
TANH = (3.34668094e-05, -4.13953712e-04, 4.16399354e-03, -4.16663367e-02, 4.99999993e-01)
LOG_COSH = (1.74241695e-06, -2.60234042e-05, 3.47107716e-04, -5.20831922e-03, 0.125)
# log(1 + e) / e on [0, exp(-1)].
LOG1P = (
    *(5.26536976e-02, -1.30238778e-01, 1.91842718e-01, -2.49017146e-01),
    *(3.33275586e-01, -4.99998710e-01, 9.99999995e-01),
)


# --- Divergence and length along a path of logits -------------------------------------------------


def path_js_div(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    edge_weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
) -> Tensor:
    """`fastgeo_kernels.path_js_div` in plain PyTorch; takes and gives float64 as well."""
    check_options(logits, reduction, edge_weight, sample_weight, temperature)
    rows = _PathJSDiv.apply(logits, float(temperature))
    return reduce_rows(rows, reduction, edge_weight, sample_weight)


def path_js_div_value_and_grad(
    logits: Tensor,
    edge_weight: Optional[Tensor] = None,
    *,
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
) -> Tuple[Tensor, Tensor]:
    """`fastgeo_kernels.path_js_div_value_and_grad` in plain PyTorch; float64 as well."""
    check_options(logits, "batchmean", edge_weight, sample_weight, temperature)
    with torch.no_grad():
        upstream = row_weights(logits, edge_weight, sample_weight)
        rows, grad = _by_chunks(_rows_and_grad, logits, float(temperature), upstream)
        return reduce_rows(rows, "batchmean", None, sample_weight), grad


@torch.no_grad()
def path_fisher_rao(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
) -> Tensor:
    """`fastgeo_kernels.path_fisher_rao` in plain PyTorch; float64 as well."""
    check_options(logits, reduction, None, sample_weight, temperature)
    (hellinger,) = _by_chunks(_squared_hellinger, logits, float(temperature))
    return reduce_fisher_rao(hellinger, reduction, sample_weight)


class _PathJSDiv(torch.autograd.Function):
    """[N, B, C] logits -> [E, B] nats, any upstream gradient, first order only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, temperature: float) -> Tensor:
        return _by_chunks(_rows, logits, temperature)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, ctx.temperature = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (logits,) = ctx.saved_tensors
        return _by_chunks(_grad, logits, ctx.temperature, upstream)[0], None


def _by_chunks(function, logits: Tensor, temperature: float, upstream: Optional[Tensor] = None):
    """Runs over slices of the batch that stay in a CPU's cache; every result has B second."""
    points, batch, classes = logits.shape
    size = max(1, CHUNK // (points * classes))
    if size >= batch or logits.is_cuda or torch.compiler.is_compiling():
        return function(logits, temperature, upstream)
    parts = [
        function(
            logits[:, start : start + size],
            temperature,
            None if upstream is None else upstream[:, start : start + size],
        )
        for start in range(0, batch, size)
    ]
    return tuple(torch.cat(part, 1) for part in zip(*parts))


def _rows(logits: Tensor, temperature: float, _=None):
    p, d = _softmax_and_log_ratio(logits, temperature)
    return (_jensen_shannon(p, d, *_log_ratio_terms(d)[2:]),)


def _grad(logits: Tensor, temperature: float, upstream: Tensor):
    p, d = _softmax_and_log_ratio(logits, temperature)
    terms = _log_ratio_terms(d)
    return (_jensen_shannon_grad(p, d, *terms[:2], upstream / temperature).to(logits.dtype),)


def _rows_and_grad(logits: Tensor, temperature: float, upstream: Tensor):
    p, d = _softmax_and_log_ratio(logits, temperature)
    terms = _log_ratio_terms(d)
    grad = _jensen_shannon_grad(p, d, *terms[:2], upstream / temperature)
    return _jensen_shannon(p, d, *terms[2:]), grad.to(logits.dtype)


def _squared_hellinger(logits: Tensor, temperature: float, _=None):
    """|sqrt p - sqrt q|^2 = sum max(p, q) (1 - exp(-|d| / 2))^2, [E, B]."""
    p, d = _softmax_and_log_ratio(logits, temperature)
    gap = _gap(p, d, _log_ratio_terms(d)[3])
    larger = torch.maximum(p[:-1], p[1:])
    total = (larger * torch.expm1(d.abs() / -2).square()).sum(-1)
    return ((total - gap.square() / 4).clamp(min=0),)


def _softmax_and_log_ratio(logits: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Probabilities [N, B, C] and d = log p - log q of neighbouring rows [E, B, C]."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    x = x.clamp(min=LOWEST)  # masked classes (-inf): finite, so that their differences are
    top = x.amax(-1, keepdim=True)
    p = _exp((x - top).div_(temperature))
    total = p.sum(-1, keepdim=True)
    lse = total.log()
    d, lost = _exact_difference(x[:-1], x[1:])
    top_difference, top_lost = _exact_difference(top[:-1], top[1:])
    d.sub_(top_difference).add_(lost).div_(temperature)
    return p.div_(total), d.sub_(lse[:-1] - lse[1:] + top_lost / temperature)


def _exact_difference(x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """x - y, and the rounding error of it (Knuth's two-sum)."""
    difference = x - y
    y_seen = x - difference
    lost = (difference + y_seen).neg_().add_(x)
    return difference, lost.add_(y_seen.sub_(y))


def _exp(x: Tensor) -> Tensor:
    """exp; the fp32 exp2 of a CPU takes a quarter of its time."""
    return x.exp() if x.dtype == torch.float64 else torch.exp2(x.mul_(1 / LN2))


def _log_ratio_terms(d: Tensor) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """log(max(p, q) / m), the same less log 2, h / 2 and tanh(d / 2), each [E, B, C] like d."""
    a = d.abs()
    if d.dtype == torch.float64:
        z = a / 2
        near = z * torch.tanh(z) - torch.log1p(2 * torch.sinh(z / 2).square())
        e = torch.exp(-a)
        below = -torch.log1p(e)
        far = LN2 + below - a * e / (1 + e)
        larger = -torch.log1p(torch.expm1(-a) / 2)
        return larger, below, torch.where(a < 2, near, far), torch.tanh(d / 2)
    # Both branches are finite everywhere, and lerp with a weight of 0 or 1 picks one exactly, in
    # a tenth of the time of a CPU's `where`.
    far = (a >= 1).to(d.dtype)
    z = d.clamp(-1, 1)
    u = z.square()
    tanh = _polynomial(u, TANH).mul_(z)
    log_cosh = _polynomial(u, LOG_COSH).mul_(u)
    half = z.div_(2)
    e = torch.exp2(a.mul(-1 / LN2))
    below_far = _polynomial(e, LOG1P).mul_(e).neg_()
    larger_far = below_far + LN2
    larger_near = half.abs().sub_(log_cosh)
    larger = larger_near.lerp(larger_far, far)
    below = larger_near.sub_(LN2).lerp(below_far, far)
    inverse = (1 + e).reciprocal_()
    h = (half * tanh).sub_(log_cosh).lerp(larger_far.sub_(a.mul_(e).mul_(inverse)), far)
    tanh = tanh.lerp(inverse.mul_(4).sub_(2).mul_(half), far)  # far: half = 1/2, signed
    return larger, below, h, tanh


def _polynomial(u: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, the highest coefficient first."""
    result = u * coefficients[0]
    for coefficient in coefficients[1:-1]:
        result.add_(coefficient).mul_(u)
    return result.add_(coefficients[-1])


def _jensen_shannon(p: Tensor, d: Tensor, half_h: Tensor, tanh: Tensor) -> Tensor:
    """[N, B, C], then [E, B, C] each -> [E, B] nats.

    The rounding of the two log-sum-exps shifts a whole row of d, which would ruin the value of
    near-equal rows. sum(p - q) = 2 sum(m tanh(d / 2)) sees that shift; its square comes off.
    """
    total = ((p[:-1] + p[1:]) * half_h).sum(-1)
    return (total - _gap(p, d, tanh).square() / 4).div(2).clamp(0, LN2)


def _gap(p: Tensor, d: Tensor, tanh: Tensor) -> Tensor:
    """sum(p - q) as d sees it, [E, B]."""
    return ((p[:-1] + p[1:]) * tanh).sum(-1)


def _jensen_shannon_grad(
    p: Tensor, d: Tensor, larger: Tensor, below: Tensor, upstream: Tensor
) -> Tensor:
    """[N, B, C], [E, B, C] each, upstream [E, B] -> d(sum upstream * JSD) / dlogits [N, B, C]."""
    scale = (upstream / 2)[..., None]
    # A constant taken off every log(p / m) of a row changes nothing. Where most of p and of q is on
    # classes that the other lacks, they are all near log 2, and keep their digits without it.
    alone = (d >= 1).to(d.dtype).mul_(p[:-1]).add_((d <= -1).to(d.dtype).mul_(p[1:]))
    larger = larger.lerp(below, (alone.sum(-1, keepdim=True) > 1).to(d.dtype))
    first = _centred(d.clamp(max=0).add_(larger), p[:-1]).mul_(scale)
    second = _centred(larger - d.clamp(min=0), p[1:]).mul_(scale)
    grad = torch.cat([first[:1], second[:-1] + first[1:], second[-1:]])
    # The class with more than half of a row takes what makes the row sum to 0: its own closed
    # form is the difference of two numbers near log 2.
    leads = (p > 0.5).to(p.dtype)
    rest = (grad * (1 - leads)).sum(-1, keepdim=True)
    return grad.lerp(-rest.expand_as(grad), leads)


def _centred(log_ratio: Tensor, p: Tensor) -> Tensor:
    """p (log(p / m) - sum p log(p / m)), [E, B, C]."""
    return log_ratio.sub_((log_ratio * p).sum(-1, keepdim=True)).mul_(p)


def reduce_rows(
    rows: Tensor, reduction: str, edge_weight: Optional[Tensor], sample_weight: Optional[Tensor]
) -> Tensor:
    """[E, B] nats, weighted; averaged over B for "batchmean"."""
    if edge_weight is not None:
        rows = rows * edge_weight.to(rows.dtype)[:, None]
    if reduction == "none":
        return rows if sample_weight is None else rows * sample_weight.to(rows.dtype)
    return _batch_mean(rows, sample_weight)


def reduce_fisher_rao(hellinger: Tensor, reduction: str, sample_weight: Optional[Tensor]) -> Tensor:
    """[E, B] of |sqrt p - sqrt q|^2 -> radians: 4 asin(|sqrt p - sqrt q| / 2), [E, B] or [E]."""
    distance = 4 * torch.asin((hellinger.sqrt() / 2).clamp(max=math.sqrt(0.5)))
    if reduction == "none":
        return distance
    return _batch_mean(distance.square(), sample_weight).sqrt()


def row_weights(
    logits: Tensor, edge_weight: Optional[Tensor], sample_weight: Optional[Tensor]
) -> Tensor:
    """[E, B]: what the gradient of the weighted sum of the batch means gives every row."""
    edges, batch = logits.shape[0] - 1, logits.shape[1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if sample_weight is None:
        weight = torch.full((1, batch), 1 / batch, dtype=dtype, device=logits.device)
    else:
        weight = _normalised(sample_weight, dtype)[None]
    if edge_weight is not None:
        weight = weight * edge_weight.to(dtype)[:, None]
    return weight.expand(edges, batch)


def _batch_mean(rows: Tensor, sample_weight: Optional[Tensor]) -> Tensor:
    if sample_weight is None:
        return rows.mean(-1)
    return (rows * _normalised(sample_weight, rows.dtype)).sum(-1)


def _normalised(sample_weight: Tensor, dtype: torch.dtype) -> Tensor:
    weight = sample_weight.to(dtype)
    return weight / weight.sum().clamp(min=torch.finfo(dtype).tiny)


def check_options(
    logits: Tensor,
    reduction: str,
    edge_weight: Optional[Tensor],
    sample_weight: Optional[Tensor],
    temperature: float,
) -> None:
    """Raises TypeError or ValueError that says what was expected and what came."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits must be a floating point tensor, got {kind}")
    if logits.ndim != 3 or logits.shape[0] < 2 or 0 in logits.shape:
        raise ValueError(
            f"logits must be [N, B, C] with N >= 2, B >= 1, C >= 1, got {list(logits.shape)}"
        )
    if reduction not in ("batchmean", "none"):
        raise ValueError(f"reduction must be 'batchmean' or 'none', got {reduction!r}")
    if isinstance(temperature, (bool, Tensor)) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature must be a Python number, got {type(temperature).__name__}")
    if not 1e-6 <= temperature <= 1e6:
        raise ValueError(f"temperature must be between 1e-6 and 1e6, got {temperature}")
    for name, weight, letter, size in (
        ("edge_weight", edge_weight, "E", logits.shape[0] - 1),
        ("sample_weight", sample_weight, "B", logits.shape[1]),
    ):
        if weight is None:
            continue
        if not isinstance(weight, Tensor) or weight.is_complex():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
        if tuple(weight.shape) != (size,):
            raise ValueError(f"{name} must be [{letter}] = [{size}], got {list(weight.shape)}")
        if weight.device != logits.device:
            raise ValueError(
                f"{name} must be on the logits' device {logits.device}, got {weight.device}"
            )
