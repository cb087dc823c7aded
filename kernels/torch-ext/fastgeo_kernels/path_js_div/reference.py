"""The plain PyTorch of the path divergence: the oracle, and what runs without Triton.

Divergence of rows p = softmax(x) and q = softmax(y) with m = a p + b q, a = beta and b = 1 - beta,
written with d = log p - log q = (x - y) - (lse_x - lse_y):

    D       = sum a p log(p / m) + b q log(q / m) = sum m h,    h >= 0
    dD / dx = a p (log(p / m) - KL(p || m)),    dD / dy = b q (log(q / m) - KL(q || m))

For a = b = 1/2, with s = log1p(tanh(|d| / 2)):

    log(p / m) = s + min(d, 0),    log(q / m) = s - max(d, 0),
    h = d / 2 tanh(d / 2) - log cosh(d / 2)

For other weights, with u = b expm1(-d), v = a expm1(d) and g(u) = u - log1p(u):

    log(p / m) = -log1p(u),  log(q / m) = -log1p(v),  m h = a p g(u) + b q g(v)

and for the KL divergence, which is the limit of D / a as a goes to 0:

    KL(p || q) = sum p (d + expm1(-d)),  dKL / dx = p (d - KL),  dKL / dy = q - p

Every term of a sum is non-negative and nothing in it is the difference of two larger numbers, so a
value is never negative, exactly 0 for equal rows, and never NaN for finite logits. JSD: Lin,
"Divergence measures based on the Shannon entropy", IEEE Trans. Inf. Theory 37 (1991). Path energy
and lengths: Tan et al., "Geodesic Mode Connectivity", ICLR 2023 Tiny Papers, Eqs. 1 and 2.
"""

from __future__ import annotations

import math
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launching import compiling
from .options import FORWARD, HALF, SKEW, How, known

LN2 = math.log(2.0)
LOWEST = -1e30  # what a logit of -inf counts as
APART = 0.5  # nats, from which on most of p and of q is on classes that the other lacks
CHUNK = 1 << 15  # numbers of a slice of the batch: tensors of that size stay in a CPU's cache
CLASSES_INSIDE = 24  # above, a row's sum is faster where its classes lie side by side

# (z / 2 tanh(z / 2) - log cosh(z / 2)) / z^2 as a polynomial of z^2 on [0, 1], (2 atanh(s) - 2 s) /
# s^3 of s^2 on [0, 0.218], (cosh z - 1) / z^2 and (sinh z / z - 1) / z^2 of z^2 on [0, 1]; least
# relative error, the highest coefficient first.
HALF_H = (1.49842075e-05, -1.80939836e-04, 1.73488049e-03, -1.56248474e-02, 1.24999997e-01)
ATANH = (3.00498920e-01, 1.97099700e-01, 2.87770150e-01, 3.99942420e-01, 6.66666920e-01)
COSH = (2.53558762e-05, 1.38854363e-03, 4.16667351e-02, 4.99999998e-01)
SINH = (2.02570000e-04, 8.33178000e-03, 1.66666750e-01)


# --- Rows of a path, and of a pair ----------------------------------------------------------------


def path_rows_and_grad(
    logits: Tensor, kept: Optional[Tensor], how: How, upstream: Tensor
) -> Tuple[Tensor, Tensor]:
    """[E, B], and the gradient of (upstream * rows).sum(), [N, B, C]."""

    def run(logits, kept, upstream):
        points = _path_points(logits, kept, how)
        edges = _edges(*_ends(points), how)
        grad = _path_grad(points, edges, how, upstream).to(logits.dtype)
        return _by_edge(edges.value, logits), grad

    rows, grad = _by_chunks(run, logits, kept, only(kept, upstream))
    return rows, grad.contiguous()


def squared_hellinger(logits: Tensor, kept: Optional[Tensor], how: How) -> Tensor:
    """|sqrt p - sqrt q|^2 = sum max(p, q) (1 - exp(-|d| / 2))^2, [E, B]."""

    def run(logits, kept):
        first, second = _ends(_path_points(logits, kept, how))
        edges = _edges(first, second, how)
        larger = torch.maximum(first.p, second.p)
        total = (larger * torch.expm1(edges.d.abs() / -2).square()).sum(-1, keepdim=True)
        gap = _half_gap(edges.value, edges.p_kl, edges.q_kl)
        return (_by_edge(_without_the_gap(total, gap, 0.25, 1e-6).clamp(min=0), logits),)

    return _by_chunks(run, logits, kept)[0]


def pair_rows_and_grads(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    wanted: Sequence[bool],
) -> Tuple[Tensor, List[Optional[Tensor]]]:
    """[B], and the gradients of each row's own value over `how.slopes`, [B, C], that are wanted."""
    p, q = _pair_points(p_logits, q_logits, kept, how)
    edges = _edges(p, q, how, wanted)
    p_grad = _closed(_row_grad(edges.p_log, p.p, edges.p_kl), p) if wanted[0] else None
    q_grad = _closed(_row_grad(edges.q_log, q.p, edges.q_kl), q) if wanted[1] else None
    return edges.value.squeeze(-1), [p_grad, q_grad]


class PathRows(torch.autograd.Function):
    """[N, B, C] logits -> [E, B]. Keeps the logits alone, and computes their gradient from them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, kept: Optional[Tensor], temperature: float, beta: float) -> Tensor:
        how = How(temperature, beta)

        def run(logits, kept):
            first, second = _ends(_path_points(logits, kept, how))
            edges = _edges(first, second, how, (False, False))
            return (_by_edge(edges.value, logits),)

        return _by_chunks(run, logits, kept)[0]

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, kept, *how = inputs
        ctx.save_for_backward(logits, kept)
        ctx.how = How(*how)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, kept = ctx.saved_tensors
        return path_rows_and_grad(logits, kept, ctx.how, upstream)[1], None, None, None


def _by_edge(rows: Tensor, logits: Tensor) -> Tensor:
    """[E, B], of a path of two points as well."""
    return rows.reshape(len(logits) - 1, -1)


def only(kept: Optional[Tensor], upstream: Tensor) -> Tensor:
    """[..., B] without what comes to rows that are not kept, which may be NaN."""
    return upstream if kept is None else upstream.masked_fill(~kept, 0)


def _by_chunks(function: Callable, logits: Tensor, *others: Optional[Tensor]) -> Sequence[Tensor]:
    """Runs over slices of the batch, the last axis of `others` and the second of the results."""
    batch = logits.shape[1]
    slices = in_slices(batch, logits)
    if slices is None or len(slices) == 1:
        return function(logits, *others)
    results: List[Tensor] = []
    for own in slices:
        found = function(logits[:, own], *(None if x is None else x[..., own] for x in others))
        if not results:  # filled as they come: put together at the end they would be there twice
            shapes = ([len(x), batch, *x.shape[2:]] for x in found)
            results = [x.new_empty(shape) for x, shape in zip(found, shapes)]
        for whole, x in zip(results, found):
            whole[:, own] = x
    return results


def in_slices(batch: int, logits: Tensor) -> Optional[List[slice]]:
    """Slices of the batch that stay in a CPU's cache; None where there is not that cache."""
    if logits.device.type != "cpu" or compiling():
        return None
    size = max(1, CHUNK * batch // logits.numel())
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


# --- Of each row, and of each edge ----------------------------------------------------------------


class _Points(NamedTuple):
    """Rows of logits and their softmax: of a path [N, B, ...], or of one end of its edges."""

    x: Tensor  # [N, B, C], fp32 or fp64
    top: Tensor  # [N, B, 1], the largest logit
    total: Tensor  # [N, B, 1], sum exp((x - top) / T)
    p: Tensor  # [N, B, C]


class _Edges(NamedTuple):
    """Of neighbouring rows p and q: [E, B, C] or [E, B, 1], without the first axis for a pair."""

    d: Tensor  # log p - log q
    value: Tensor  # nats
    # p (log(p / m) - its limit in rows far apart); of a KL divergence p d, or q - p. And its sum.
    # None where no gradient to p is wanted.
    p_log: Optional[Tensor]
    p_kl: Optional[Tensor]
    q_log: Optional[Tensor]
    q_kl: Optional[Tensor]


def _path_points(logits: Tensor, kept: Optional[Tensor], how: How) -> _Points:
    x = _wide(logits)
    if _side_by_side(x):
        x = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return _softmax(_readable(x.clamp(min=LOWEST), kept), how)


def _pair_points(
    p_logits: Tensor, q_logits: Tensor, kept: Optional[Tensor], how: How
) -> Tuple[_Points, _Points]:
    """Of a slice of the batch as one tensor, which stays in the cache: half as many operations."""
    dtype = torch.promote_types(p_logits.dtype, q_logits.dtype)
    p, q = (_wide(x.to(dtype)) for x in (p_logits, q_logits))
    if p.is_cuda or compiling():
        x, y = (_softmax(_readable(x.clamp(min=LOWEST), kept), how) for x in (p, q))
        return x, y
    return _ends(_softmax(readable_pair(p, q, kept, p.dtype), how))


def readable_pair(p: Tensor, q: Tensor, kept: Optional[Tensor], dtype: torch.dtype) -> Tensor:
    """[2, B, C], without -inf."""
    batch, classes = p.shape
    if _side_by_side(p):
        x = torch.empty(2, classes, batch, dtype=dtype).transpose(1, 2)
    else:
        x = torch.empty(2, batch, classes, dtype=dtype)
    x[0], x[1] = p, q
    return _readable(x.clamp_(min=LOWEST), kept)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _side_by_side(x: Tensor) -> bool:
    """Whether sums over classes are faster where those of one class lie side by side."""
    return x.shape[-1] <= CLASSES_INSIDE and not (x.is_cuda or compiling())


def _readable(x: Tensor, kept: Optional[Tensor]) -> Tensor:
    """Rows that are not kept equal."""
    return x if kept is None else x.masked_fill_(~kept[:, None], 0)


def _softmax(x: Tensor, how: How) -> _Points:
    top = x.amax(-1, keepdim=True)
    p = _divided(x - top, how).exp_()
    total = p.sum(-1, keepdim=True)
    return _Points(x, top, total, p.div_(total))


def _divided(x: Tensor, how: How) -> Tensor:
    return x if how.temperature == 1 else x.mul_(1 / how.temperature)


def _ends(points: _Points) -> Tuple[_Points, _Points]:
    """The first and the second rows of all edges."""
    if len(points.x) == 2:
        first, second = zip(*(x.unbind(0) for x in points))
    else:
        first, second = zip(*((x[:-1], x[1:]) for x in points))
    return _Points(*first), _Points(*second)


def _edges(
    first: _Points, second: _Points, how: How, wanted: Sequence[bool] = (True, True)
) -> _Edges:
    """`wanted`: whether the gradients to the first and the second rows are."""
    d = _log_ratio(first, second, how)
    if how.kind == HALF:
        return _half_edges(d, first.p, second.p, wanted)
    if how.kind == SKEW:
        return _skew_edges(d, first.p, second.p, how)
    if how.kind == FORWARD:
        p_log, q_log, term = _kl_terms(d, first.p, second.p)
    else:
        q_log, p_log, term = _kl_terms(-d, second.p, first.p)
    p_kl, q_kl, total = (x.sum(-1, keepdim=True) for x in (p_log, q_log, term))
    value = _without_the_gap(total, q_kl if how.kind == FORWARD else p_kl, 0.5, 2e-6)
    return _Edges(d, value.clamp(min=0), p_log, p_kl, q_log, q_kl)


def _log_ratio(first: _Points, second: _Points, how: How) -> Tensor:
    """d = log p - log q."""
    d, lost = _exact_difference(first.x, second.x)
    top, top_lost = _exact_difference(first.top, second.top)
    offset = (first.total / second.total).log_().add_(_divided(top_lost, how))
    # A CPU rounds the tail of a tensor differently, so that sums of equal rows may differ.
    offset = F.hardshrink(offset, 2.5 * torch.finfo(d.dtype).eps)
    return _divided(d.sub_(top).add_(lost), how).sub_(offset)


def _exact_difference(x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """x - y, and the rounding error of it (Knuth's two-sum)."""
    difference = x - y
    y_seen = x - difference
    lost = x - (difference + y_seen)
    return difference, lost.add_(y_seen.sub_(y))


def _half_edges(d: Tensor, p: Tensor, q: Tensor, wanted: Sequence[bool]) -> _Edges:
    s, h, sigmoid = _half_terms(d)
    value = h.mul_(p + q).sum(-1, keepdim=True).mul_(0.5)
    lowest, highest = _range(value)
    if not highest <= APART:
        # Where most of p and of q is on classes that the other lacks, every log(p / m) that counts
        # is near its limit, and keeps its digits without it.
        s = s.lerp_(sigmoid.neg_().log1p_(), (value > APART).to(s.dtype))
    near = not lowest >= 5e-7
    p_log = p_kl = q_log = q_kl = None
    if wanted[0]:
        p_log = d.clamp(max=0).add_(s).mul_(p)
        p_kl = p_log.sum(-1, keepdim=True)
    if wanted[1] or (near and p_kl is None):
        q_log = s.sub_(d.clamp(min=0)).mul_(q)
        q_kl = q_log.sum(-1, keepdim=True)
    if near:
        value = _without_the_gap(value, _half_gap(value, p_kl, q_kl), 0.125, 5e-7)
    return _Edges(d, value.clamp_(0, LN2), p_log, p_kl, q_log, q_kl)


def _half_gap(value: Tensor, p_kl: Optional[Tensor], q_kl: Optional[Tensor]) -> Tensor:
    """KL(p || m) - KL(q || m), of whose sum the value is half."""
    if p_kl is not None:
        return 2 * (p_kl - value)
    assert q_kl is not None
    return 2 * (value - q_kl)


def _half_terms(d: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """s, h and sigmoid(-|d|), by which

    s = log(2 - 2 sigmoid(-|d|)),    h = s - |d| sigmoid(-|d|)

    and for small |d| h is a polynomial and s follows from it: no log1p, which takes a CPU longer
    than all of this."""
    below = torch.copysign(d, d.new_full((), -1))
    sigmoid = below.sigmoid()
    product = below * sigmoid
    far = torch.sub(d.new_full((), 2), sigmoid, alpha=2).log_().add_(product)
    # Both branches are finite everywhere, and lerp with a weight of 0 or 1 picks one exactly, in a
    # tenth of the time of a CPU's `where`; so do rounded numbers instead of comparisons.
    u = below.clamp(min=-1).square()
    if d.dtype == torch.float64:
        z = u.sqrt() / 2
        h = z * torch.tanh(z) - torch.log1p(2 * torch.sinh(z / 2).square())
    else:
        h = _polynomial(u, HALF_H).mul_(u)
    h.lerp_(far, u.floor_())
    return h - product, h, sigmoid


def _range(value: Tensor) -> Tuple[float, float]:
    """The smallest and the largest number, NaN where one is not known."""
    lowest, highest = (known(x) for x in value.aminmax())
    return math.nan if lowest is None else lowest, math.nan if highest is None else highest


def _skew_edges(d: Tensor, p: Tensor, q: Tensor, how: How) -> _Edges:
    a, b = how.shares
    apart = torch.minimum(p, q).sum(-1, keepdim=True) < 0.25
    shifted = apart.to(d.dtype) if known(apart.any()) is not False else None
    p_log, q_log, term = _skew_terms(d, p, q, shifted, how)
    p_kl, q_kl, total = (x.sum(-1, keepdim=True) for x in (p_log, q_log, term))
    gap = a / b * p_kl - b / a * q_kl
    value = _without_the_gap(total, gap, a * b / 2, 2e-6 * a * b)
    if shifted is not None:
        value = value.lerp(p_kl * a + q_kl * b + how.largest, shifted)
    return _Edges(d, value.clamp(0, how.largest), p_log, p_kl, q_log, q_kl)


Terms = Tuple[Tensor, Tensor, Tensor]  # p_log and q_log, and the terms of the value


def _skew_terms(d: Tensor, p: Tensor, q: Tensor, shifted: Optional[Tensor], how: How) -> Terms:
    (a, b), (p_limit, q_limit) = how.shares, how.limits
    s, positive = d.abs(), d > 0

    def by_sign(above: float, below: float) -> Tensor:
        return torch.where(positive, d.new_full((), above), d.new_full((), below))

    small, large = by_sign(b, a), by_sign(a, b)  # weights of the smaller and of the larger of p, q
    limit = by_sign(p_limit, q_limit)
    shifted = torch.zeros_like(d[..., :1]) if shifted is None else shifted
    rest = torch.log1p(small / large * torch.exp(-s))
    larger = torch.where(s < 1, -torch.log1p(small * torch.expm1(-s)), limit - rest)
    smaller = -torch.log1p(large * torch.expm1(s.clamp(max=80))) - (s - 80).clamp(min=0)
    # Of shifted rows the limit is left out, by which far classes lose their digits.
    larger = torch.where(shifted > 0, -rest, larger)
    p_shift, q_shift = p_limit * shifted, q_limit * shifted
    p_log = p * torch.where(positive, larger, smaller - p_shift)
    q_log = q * torch.where(positive, smaller - q_shift, larger)
    near = d.clamp(min=-1, max=1)
    g = a * p * _less_log1p(b * torch.expm1(-near)) + b * q * _less_log1p(a * torch.expm1(near))
    return p_log, q_log, torch.where(s < 1, g, a * p_log + b * q_log)


def _less_log1p(u: Tensor) -> Tensor:
    """u - log1p(u) for |log1p(u)| <= 1, without cancellation in fp32."""
    if u.dtype == torch.float64:
        return u - torch.log1p(u)
    s = u / (2 + u)  # log1p(u) = 2 atanh(s)
    square = s.square()
    return s * (u - square * _polynomial(square, ATANH))


def _kl_terms(d: Tensor, p: Tensor, q: Tensor) -> Terms:
    """Of KL(p || q): p d, q - p, and p (d + expm1(-d))."""
    p_log = p * d
    q_log = torch.maximum(p, q).mul_(torch.expm1(-d.abs())).mul_(d.sign())
    if d.dtype == torch.float64:
        near, picks_far = d + torch.expm1(-d), (d.abs() >= 1).to(d.dtype)
        near = near.clamp(max=1) * p
    else:
        z = d.clamp(min=-1, max=1)
        u = z.square()
        near = _polynomial(u, COSH).sub_(_polynomial(u, SINH).mul_(z)).mul_(u).mul_(p)
        picks_far = z.abs_().floor_()
    # A class that q lacks altogether; p d is finite, since -inf counts as a very low logit.
    term = near.lerp_(p_log + q_log, picks_far)
    return p_log, q_log, term.masked_fill_((d > 1e20) & (p > 0), math.inf)


def _polynomial(u: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Horner's rule, the highest coefficient first."""
    result = torch.add(u.new_full((), coefficients[1]), u, alpha=coefficients[0])
    for coefficient in coefficients[2:]:
        result = torch.addcmul(u.new_full((), coefficient), result, u)
    return result


def _without_the_gap(total: Tensor, gap: Tensor, scale: float, near: float) -> Tensor:
    """The rounding of the two log-sum-exps shifts a whole row of d, which would ruin the value of
    near-equal rows: its square is taken off there. What the shift is shows in a combination of the
    two sums that is otherwise of third order in d."""
    return torch.where(total < near, total.addcmul(gap, gap, value=-scale), total)


def _path_grad(points: _Points, edges: _Edges, how: How, upstream: Tensor) -> Tensor:
    """d(sum upstream * rows) / dlogits, [N, B, C]; overwrites p_log and q_log."""
    upstream = (upstream[0] if len(points.p) == 2 else upstream)[..., None]
    first, second = _ends(points)
    grad = torch.zeros_like(points.p)
    p_slope, q_slope = how.slopes
    grad[:-1].addcmul_(_row_grad(edges.p_log, first.p, edges.p_kl), upstream * p_slope)
    grad[1:].addcmul_(_row_grad(edges.q_log, second.p, edges.q_kl), upstream * q_slope)
    return _closed(grad, points)


def _row_grad(log: Optional[Tensor], p: Tensor, kl: Optional[Tensor]) -> Tensor:
    """What an edge gives to one of its rows, over its slope; overwrites `log`."""
    assert log is not None and kl is not None
    return log.addcmul_(p, kl, value=-1)


def _closed(grad: Tensor, points: _Points) -> Tensor:
    """Closes rows of which one class may have more than half, which are those of a sum below 2."""
    if known((points.total < 2).any()) is False:
        return grad
    return close(grad, points.p)


def close(grad: Tensor, p: Tensor) -> Tensor:
    """Gives the class with more than half of a row what makes the row sum to 0: its own closed form
    is the difference of two nearly equal numbers."""
    leads = p.round()
    grad.addcmul_(grad, leads, value=-1)
    return grad.addcmul_(leads, grad.sum(-1, keepdim=True), value=-1)
