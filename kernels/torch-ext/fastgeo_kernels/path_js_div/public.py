"""Divergence between neighbouring rows of a path of logits, and its gradient, in one launch.

With p = softmax(x / T), q = softmax(y / T), m = (p + q) / 2 and d = log p - log q, the value is
1/2 sum (p + q) h and the gradient 1/2 p (log(p / m) - KL(p || m)) / T; the formula and its source
stand in `reference.py`, with those of other weights in m. Four things keep fp32 enough:

* d is the difference of the logits, with its rounding error added back, then of the two rows'
  log-sum-exps. What those two still round shifts a whole row of d: the gradient does not feel such
  a shift, and from the value of near-equal rows its square, (KL(p || m) - KL(q || m))^2 / 8, is
  taken off.
* For |d| < 1 polynomials give log cosh(d / 2) and h: the closed forms cancel there.
* Where most of p and of q is on classes that the other lacks, every log(p / m) that counts is
  near log 2. The gradient stays as it is without that constant, and only then keeps its digits.
* A class with more than half of a row takes the gradient that makes the row sum to 0: its own
  closed form is the difference of two nearly equal numbers. Where a kernel holds the whole row, its
  gradient less p times what it sums to says the same.

Rows with |d| below 1 for all classes, as of a path that is nearly a geodesic, need the polynomials
alone, and of x - y mostly no rounding error: where a kernel holds them it then takes that shorter
way (`_rounding_shows` says when not).

A program walks along the path and holds the row it came from in registers, so that logits are read
once and gradients written once. A row that does not fit is swept in tiles: log-sum-exp, sums, and
the gradients of both rows, of which the second waits in memory for its other edge. Nothing is added
atomically: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..launching import compiling, recorded_whole, use_triton
from . import plain_pairs, reference
from .operators import PairRows, PathRows, rows_op, value_and_grad_op
from .options import (
    How,
    Normalizer,
    check_floating,
    check_how,
    check_normalizer,
    check_path,
    check_weight,
    reduce_fisher_rao,
    reduce_rows,
    row_weights,
    shares,
)

NAME = "the path divergence"


def path_js_div(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    edge_weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    normalizer: Normalizer = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    impl: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence between neighbouring rows of a path of logits.

    In exact arithmetic the same as::

        p = (logits / temperature).softmax(-1)
        m = beta * p[:-1] + (1 - beta) * p[1:]
        kl = lambda p: (p * (p / m).log()).sum(-1)
        (beta * kl(p[:-1]) + (1 - beta) * kl(p[1:])).mean(-1)

    Args:
        logits: [N, B, C] with N >= 2, floating point, any strides. Computed in fp32 (fp64 for
            fp64 logits, in plain PyTorch). Classes with a logit of -inf in both rows drop out;
            in one row only they give the limit of a probability that goes to 0. A row of
            nothing but -inf counts as uniform.
        reduction: "batchmean" averages over B; "none" keeps every row.
        edge_weight: [E], multiplies the values.
        sample_weight: [B], bool, or finite and not negative: "batchmean" is then the weighted mean
            (0 where all weights are 0); "none" multiplies every row by its weight. Logits of a
            sample of weight 0 are not read, and may be NaN or inf.
        normalizer: what the sum over the batch is divided by, in place of B or of the sum of the
            weights: a number, or a tensor of one, which is not read by the host. Of the tokens of
            several devices or micro-batches, their common number.
        temperature: divides the logits; between 1e-6 and 1e6. No value compiles a kernel anew.
        beta: weight of the first row of an edge in m. 0 gives KL(p || q) of an edge (p, q), 1 gives
            KL(q || p): the limits of the divergence over beta, and over 1 - beta.
        impl: "triton" (on a GPU; on a CPU under TRITON_INTERPRET=1), "torch", or "auto": Triton
            for fp32, bf16 and fp16 logits on a GPU, else PyTorch.

    Returns:
        [E] or [E, B] nats, E = N - 1, before the weights within [0, the entropy of (beta, 1 -
        beta)], which is ln 2 for 1/2; of a KL divergence without bound, and inf where a logit is
        -inf in the wrong row only. fp32 (fp64 for fp64 logits). Differentiable once, under any
        upstream gradient; second derivatives and forward-mode differentiation raise.

    Raises:
        TypeError: logits or weights that are not real floating point tensors.
        ValueError: another shape than [N >= 2, B >= 1, C >= 1], weights of another shape or
            device, a sample_weight that is negative or not finite (on a GPU, and while a graph is
            traced, where looking is not possible, the result is NaN), a number out of range, an
            unknown reduction or impl.
        RuntimeError: impl="triton" where it cannot run; the message says what is missing.

    Example:
        >>> path_js_div(torch.zeros(3, 5, 10))
        tensor([0., 0.])
    """
    how = How(temperature, beta)
    check_path(logits, reduction, edge_weight, sample_weight, how)
    check_normalizer(normalizer, reduction)
    weights = row_weights(sample_weight, _value_dtype(logits))
    rows = PathRows.apply if use_triton(NAME, impl, logits) else reference.PathRows.apply
    values = rows(logits, weights.kept, *map(float, how))
    return reduce_rows(values, reduction, edge_weight, weights, normalizer)


def path_js_div_value_and_grad(
    logits: Tensor,
    edge_weight: Optional[Tensor] = None,
    *,
    sample_weight: Optional[Tensor] = None,
    normalizer: Normalizer = None,
    temperature: float = 1.0,
    beta: float = 0.5,
    impl: str = "auto",
) -> Tuple[Tensor, Tensor]:
    """Divergence of every edge, and the gradient of their (weighted) sum, in one call.

    Equivalent to::

        value = path_js_div(logits)
        (grad,) = torch.autograd.grad((edge_weight * value).sum(), logits)

    On a GPU one launch reads the logits once and writes the gradient once; batches that need more
    than one program add a sum of the programs' shares of the value.

    Args:
        logits: [N, B, C] with N >= 2, floating point, any strides; -inf as in `path_js_div`.
        edge_weight: [E], one weight an edge; all 1 by default.
        sample_weight, normalizer, temperature, beta, impl: as in `path_js_div`.

    Returns:
        [E] nats (fp32, or fp64 for fp64 logits), not multiplied by edge_weight; and [N, B, C] in
        the logits' dtype, contiguous. Neither is attached to the graph.

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`.

    Example:
        >>> value, grad = path_js_div_value_and_grad(torch.randn(25, 256, 10))
        >>> value.shape, grad.shape
        (torch.Size([24]), torch.Size([25, 256, 10]))
    """
    how = How(temperature, beta)
    check_path(logits, "batchmean", edge_weight, sample_weight, how)
    check_normalizer(normalizer, "batchmean")
    triton = use_triton(NAME, impl, logits)
    with torch.no_grad():
        weights = row_weights(sample_weight, _value_dtype(logits))
        plain = weights.weight is None and normalizer is None
        if triton and plain:
            upstream = None
            if edge_weight is not None:
                upstream = edge_weight.float()[:, None].expand(-1, logits.shape[1])
            return value_and_grad_op(logits, upstream, None, True, *map(float, how))
        upstream = shares(weights, normalizer, logits[..., 0])
        upstream = upstream.expand(logits.shape[0] - 1, logits.shape[1])
        if edge_weight is not None:
            upstream = upstream * edge_weight.to(upstream.dtype)[:, None]
        if triton:
            rows, grad = value_and_grad_op(logits, upstream, weights.kept, False, *map(float, how))
        else:
            rows, grad = reference.path_rows_and_grad(logits, weights.kept, how, upstream)
        return reduce_rows(rows, "batchmean", None, weights, normalizer), grad


def js_div(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    beta: float = 0.5,
    reduction: str = "batchmean",
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
    sample_weight: Optional[Tensor] = None,
    normalizer: Normalizer = None,
    temperature: float = 1.0,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Divergence between the softmax of two tensors of logits, as Jensen-Shannon or KL.

    In exact arithmetic the same as::

        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        log_m = (beta * p + (1 - beta) * q).log()
        kl = lambda p: F.kl_div(log_m, p, reduction="none").sum(-1)
        (beta * kl(p) + (1 - beta) * kl(q)).mean()

    That is the generalised Jensen-Shannon divergence of Agarwal et al., "On-Policy Distillation of
    Language Models" (ICLR 2024), with p the teacher and q the student, as TRL's `GKDTrainer` and
    Liger-Kernel's `LigerJSD` have it, whose first argument is the student. As there beta = 0 gives
    the forward divergence KL(p || q) and beta = 1 the reverse one KL(q || p), which are the limits
    of the above divided by beta and by 1 - beta.

    Args:
        p_logits, q_logits: [..., C], floating point, of one shape and device; dtypes may differ.
            What needs no gradient costs none, and on a GPU neither is copied.
        beta: weight of p in m: 0, 1, or between 1e-6 and 1 - 1e-6.
        reduction: "batchmean" averages over everything but C; "none" keeps every row.
        labels: [...], integers: rows whose label is `ignore_index` count nothing, like those of
            weight 0.
        sample_weight: [...], bool, or finite and not negative, as in `path_js_div`.
        normalizer, temperature, impl: as in `path_js_div`.
        inplace: the backward pass writes the gradient to q_logits over them, which are to be
            contiguous, and of which nothing may be read any more then: another backward pass that
            needs them raises. Not in a compiled graph, which plans its memory itself.

    Returns:
        A scalar, or [...], in nats, within the bounds that `path_js_div` has; fp32 (fp64 for fp64
        logits). Differentiable once, in both arguments. Where q has no probability of a class of p
        (a logit of -inf), KL(p || q) is inf, its gradient to q_logits still q - p, and that to
        p_logits of the size 1e30.

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`, and for arguments that differ in
            shape or device.

    Example:
        >>> js_div(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
        tensor(0.6931)
    """
    js_div = _recorded_js_div if compiling() else _js_div
    weighted = (labels, ignore_index, sample_weight, normalizer)
    return js_div(p_logits, q_logits, beta, reduction, *weighted, temperature, inplace, impl)


def _js_div(
    p_logits: Tensor,
    q_logits: Tensor,
    beta: float,
    reduction: str,
    labels: Optional[Tensor],
    ignore_index: int,
    sample_weight: Optional[Tensor],
    normalizer: Normalizer,
    temperature: float,
    inplace: bool,
    impl: str,
) -> Tensor:
    how = How(temperature, beta)
    check_how(reduction, how)
    check_normalizer(normalizer, reduction)
    _check_pair(p_logits, q_logits)
    leading = p_logits.shape[:-1]
    p, q = (x if x.ndim == 2 else x.reshape(-1, x.shape[-1]) for x in (p_logits, q_logits))
    for name, given in (("labels", labels), ("sample_weight", sample_weight)):
        check_weight(name, given, "", leading, p_logits)
    labels, sample_weight = (None if t is None else t.reshape(-1) for t in (labels, sample_weight))
    weights = row_weights(sample_weight, _value_dtype(p, q), labels, ignore_index)
    if inplace and (compiling() or not q_logits.is_contiguous()):
        raise ValueError("inplace needs contiguous q_logits, and a graph that is not compiled")
    if _either_triton(impl, p, q):
        rows = PairRows.apply(p, q, weights.kept, *map(float, how), inplace)
    elif reduction == "batchmean":
        every = weights.weight is None and normalizer is None
        share = 1 / len(p) if every else shares(weights, normalizer, p[:, 0])
        return plain_pairs.pair_rows(p, q, weights.kept, how, inplace, share)
    else:
        rows = plain_pairs.pair_rows(p, q, weights.kept, how, inplace)
    value = reduce_rows(rows, reduction, None, weights, normalizer)
    return value if reduction == "batchmean" else value.reshape(leading)


_recorded_js_div = recorded_whole(_js_div)


def _value_dtype(*logits: Tensor) -> torch.dtype:
    """What values are computed in and returned as."""
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def _either_triton(impl: str, p: Tensor, q: Tensor) -> bool:
    """Whether a pair runs in Triton, which takes both or neither."""
    return use_triton(NAME, impl, p) and use_triton(NAME, impl, q)


@torch.no_grad()
def path_fisher_rao(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Fisher-Rao distance between neighbouring rows of a path of logits; not differentiable.

    In exact arithmetic the same as::

        p = (logits / temperature).softmax(-1)
        d = 2 * (p[:-1] * p[1:]).sqrt().sum(-1).acos()
        d.square().mean(-1).sqrt()

    but evaluated as 4 asin(|sqrt p - sqrt q| / 2), which keeps its digits for near-equal rows.

    Args:
        logits: [N, B, C] with N >= 2, floating point.
        reduction: "batchmean" gives the distance of the joint distributions p(x) p(y | x), the
            root mean square over B; "none" the distance of every row, 0 for one of weight 0.
        sample_weight: [B], as in `path_js_div`; the mean square is then the weighted one.
        temperature, impl: as in `path_js_div`.

    Returns:
        [E] or [E, B] radians, each within [0, pi]; fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`.

    Example:
        >>> path_fisher_rao(torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]]))
        tensor([3.1416])
    """
    how = How(temperature)
    check_path(logits, reduction, None, sample_weight, how)
    weights = row_weights(sample_weight, _value_dtype(logits))
    if use_triton(NAME, impl, logits):
        hellinger = rows_op(logits, weights.kept, *map(float, how), True)
    else:
        hellinger = reference.squared_hellinger(logits, weights.kept, how)
    return reduce_fisher_rao(hellinger, reduction, weights)


def _check_pair(p_logits: Tensor, q_logits: Tensor) -> None:
    check_floating("p_logits", p_logits)
    check_floating("q_logits", q_logits)
    p, q = ((list(x.shape), x.device) for x in (p_logits, q_logits))
    if p != q:
        raise ValueError(f"p_logits and q_logits must have one shape and device, got {p} and {q}")
    if p_logits.ndim < 1 or p_logits.numel() == 0:
        raise ValueError(f"p_logits must be [..., C] and not empty, got {list(p_logits.shape)}")
