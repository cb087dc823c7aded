"""The plain PyTorch of every operation: the oracle, and what runs without Triton.

Divergence of neighbouring rows p = softmax(x), q = softmax(y), m = (p + q) / 2, written with
d = log p - log q = (x - y) - (lse_x - lse_y):

    log(p / m) = s + min(d, 0),  log(q / m) = s - max(d, 0),  s = -log1p(expm1(-|d|) / 2)
    JSD        = 1/2 sum (p + q) h,   h = d / 2 tanh(d / 2) - log cosh(d / 2) >= 0
    dJSD / dx  = 1/2 p (log(p / m) - KL(p || m))

Every term of the sum is non-negative and nothing in it is the difference of two larger numbers, so
the value is never negative, exactly 0 for equal rows, and never NaN for finite logits. JSD: Lin,
"Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991). Path energy
and lengths: Tan et al., "Geodesic Mode Connectivity", ICLR 2023 Tiny Papers, Eqs. 1 and 2.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LN2 = math.log(2.0)
LOWEST = -1e30  # what a logit of -inf counts as
CHUNK = 1 << 18  # numbers of a slice of the batch: tensors of that size stay in a CPU's cache

CLASSES_INSIDE = 24  # above, a row's sum is faster where its classes lie side by side

# -log cosh(z / 2) / z^2 and (z / 2 tanh(z / 2) - log cosh(z / 2)) / z^2 as polynomials of z^2 on
# [0, 1], and log(1 + e) / e on [0, exp(-1)], least relative error; the highest coefficient first.
LOG_COSH = (2.25386549e-05, -3.44929821e-04, 5.20788366e-03, -1.24999986e-01)
HALF_H = (1.49842075e-05, -1.80939836e-04, 1.73488049e-03, -1.56248474e-02, 1.24999997e-01)
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
        return reduce_rows(rows, "batchmean", None, sample_weight), grad.contiguous()


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
    if logits.is_cuda or torch.compiler.is_compiling():
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


class _Edges(NamedTuple):
    """The edges of a path, each with its rows p and q: [N, B, C], [E, B, C] or [E, B, 1]."""

    p: Tensor  # of every point
    d: Tensor  # log p - log q
    log_p: Tensor  # log(p / m) - shift
    log_q: Tensor
    kl_p: Tensor  # KL(p || m) - shift
    kl_q: Tensor
    # log 2 where most of p and of q is on classes that the other lacks, else 0. There every
    # log(p / m) that counts is near log 2, and keeps its digits without it.
    shift: Tensor
    value: Tensor  # (p + q) h; where |d| is large, p log_p + q log_q


def _rows(logits: Tensor, temperature: float, _=None):
    return (_jensen_shannon(_edges(logits, temperature)),)


def _grad(logits: Tensor, temperature: float, upstream: Tensor):
    edges = _edges(logits, temperature)
    return (_jensen_shannon_grad(edges, upstream / temperature).to(logits.dtype),)


def _rows_and_grad(logits: Tensor, temperature: float, upstream: Tensor):
    edges = _edges(logits, temperature)
    value = _jensen_shannon(edges)
    return value, _jensen_shannon_grad(edges, upstream / temperature).to(logits.dtype)


def _squared_hellinger(logits: Tensor, temperature: float, _=None):
    """|sqrt p - sqrt q|^2 = sum max(p, q) (1 - exp(-|d| / 2))^2, [E, B]."""
    edges = _edges(logits, temperature)
    larger = torch.maximum(edges.p[:-1], edges.p[1:])
    total = (larger * torch.expm1(edges.d.abs() / -2).square()).sum(-1)
    return (_without_the_gap(total, edges).clamp(min=0),)


def _edges(logits: Tensor, temperature: float) -> _Edges:
    p, d = _softmax_and_log_ratio(logits, temperature)
    first, second = p[:-1], p[1:]
    overlap = torch.minimum(first, second).sum(-1, keepdim=True)
    shift = (overlap < 0.25).to(d.dtype) * LN2
    larger, half_h, far = _log_ratio_terms(d, shift)
    log_p = larger + d.clamp(max=0)
    log_q = larger.sub_(d.clamp(min=0))
    near = half_h.mul_(first + second)
    there, back = first * log_p, second * log_q
    kl_p, kl_q = there.sum(-1, keepdim=True), back.sum(-1, keepdim=True)
    return _Edges(p, d, log_p, log_q, kl_p, kl_q, shift, near.lerp(there.add_(back), far))


def _softmax_and_log_ratio(logits: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """Probabilities [N, B, C] and d = log p - log q of neighbouring rows [E, B, C]."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    if x.shape[2] <= CLASSES_INSIDE and not (x.is_cuda or torch.compiler.is_compiling()):
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    x = x.clamp(min=LOWEST)  # masked classes (-inf): finite, so that their differences are
    top = x.amax(-1, keepdim=True)
    p = _exp(x - top, 1 / temperature)
    total = p.sum(-1, keepdim=True)
    lse = total.log()
    d, lost = _exact_difference(x[:-1], x[1:])
    top_difference, top_lost = _exact_difference(top[:-1], top[1:])
    offset = lse[:-1] - lse[1:] + top_lost / temperature
    # A CPU rounds the tail of a tensor differently, so that sums of equal rows may differ.
    offset *= d.abs().amax(-1, keepdim=True) > 0
    return p.div_(total), d.sub_(top_difference).add_(lost).div_(temperature).sub_(offset)


def _exact_difference(x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """x - y, and the rounding error of it (Knuth's two-sum)."""
    difference = x - y
    y_seen = x - difference
    lost = x - (difference + y_seen)
    return difference, lost.add_(y_seen.sub_(y))


def _exp(x: Tensor, scale: float) -> Tensor:
    """exp(scale x); the fp32 exp2 of a CPU takes a quarter of its time."""
    return x.mul_(scale).exp_() if x.dtype == torch.float64 else x.mul_(scale / LN2).exp2_()


def _log_ratio_terms(d: Tensor, shift: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """log(max(p, q) / m) - shift; h where |d| is small; and where it is not, 1 there and 0
    elsewhere. Each [E, B, C] like d."""
    a = d.abs()
    if d.dtype == torch.float64:
        z = a.clamp(max=2) / 2
        h = z * torch.tanh(z) - torch.log1p(2 * torch.sinh(z / 2).square())
        return -torch.log1p(torch.expm1(-a) / 2) - shift, h, (a >= 2).to(d.dtype)
    # Both branches are finite everywhere, and lerp with a weight of 0 or 1 picks one exactly, in
    # a tenth of the time of a CPU's `where`; so do rounded numbers in place of comparisons.
    z = a.clamp(max=1)
    u = z.square()
    near = _polynomial(u, LOG_COSH).mul_(u).sub_(shift).add_(a, alpha=0.5)
    e = _exp(a, -1)
    far = _polynomial(e, LOG1P).mul_(e).neg_().add_(LN2 - shift)
    picks_far = z.floor_()
    return near.lerp(far, picks_far), _polynomial(u, HALF_H).mul_(u), picks_far


def _polynomial(u: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, the highest coefficient first."""
    result = u * coefficients[0]
    for coefficient in coefficients[1:-1]:
        result.add_(coefficient).mul_(u)
    return result.add_(coefficients[-1])


def _jensen_shannon(edges: _Edges) -> Tensor:
    """[E, B] nats."""
    value = _without_the_gap(edges.value.sum(-1), edges)
    apart = (edges.kl_p + edges.kl_q).squeeze(-1) + 2 * LN2
    return torch.where(edges.shift.squeeze(-1) > 0, apart, value).div(2).clamp(0, LN2)


def _without_the_gap(total: Tensor, edges: _Edges) -> Tensor:
    """The rounding of the two log-sum-exps shifts a whole row of d, which would ruin the value of
    near-equal rows: there KL(p || m) - KL(q || m), otherwise of third order in d, is that shift."""
    gap = (edges.kl_p - edges.kl_q).squeeze(-1) / 2
    return torch.where(total < 1e-6, total - gap.square(), total)


def _jensen_shannon_grad(edges: _Edges, upstream: Tensor) -> Tensor:
    """upstream [E, B] -> d(sum upstream * JSD) / dlogits [N, B, C]; overwrites log_p, log_q."""
    scale = (upstream / 2)[..., None]
    grad = torch.zeros_like(edges.p)
    grad[:-1].add_(edges.log_p.sub_(edges.kl_p).mul_(scale))
    grad[1:].add_(edges.log_q.sub_(edges.kl_q).mul_(scale))
    grad.mul_(edges.p)
    # The class with more than half of a row takes what makes the row sum to 0: its own closed
    # form is the difference of two numbers near log 2.
    leads = edges.p.round()
    grad.addcmul_(grad, leads, value=-1)
    return grad.addcmul_(leads, grad.sum(-1, keepdim=True), value=-1)


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
