"""Divergence between neighbouring rows of a path of logits, and its gradient, in one launch.

With p = softmax(x / T), q = softmax(y / T), m = (p + q) / 2 and d = log p - log q, the value is
1/2 sum (p + q) h and the gradient 1/2 p (log(p / m) - KL(p || m)) / T; the formula and its source
stand in `reference.py`. Four things keep fp32 enough:

* d is the difference of the logits, with its rounding error added back, then of the two rows'
  log-sum-exps. What those two still round shifts a whole row of d: the gradient does not feel such
  a shift, and from the value of near-equal rows its square, (KL(p || m) - KL(q || m))^2 / 8, is
  taken off.
* For |d| < 1 polynomials give log cosh(d / 2) and h: the closed forms cancel there.
* Where most of p and of q is on classes that the other lacks, every log(p / m) that counts is
  near log 2. The gradient stays as it is without that constant, and only then keeps its digits.
* A class with more than half of a row takes the gradient that makes the row sum to 0: its own
  closed form is the difference of two nearly equal numbers.

A program walks along the path and holds the row it came from in registers, so that logits are read
once and gradients written once. A row that does not fit is swept in tiles: log-sum-exp, sums, and
the gradients of both rows, of which the second waits in memory for its other edge. Nothing is added
atomically: results repeat bit for bit.
"""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from ..launching import use_triton
from . import reference
from .operators import PathJSDiv, rows_op, value_and_grad_op


def path_js_div(
    logits: Tensor,
    *,
    reduction: str = "batchmean",
    edge_weight: Optional[Tensor] = None,
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence between neighbouring rows of a path of logits.

    In exact arithmetic the same as::

        p = (logits / temperature).softmax(-1)
        m = (p[:-1] + p[1:]) / 2
        kl = lambda p: (p * (p / m).log()).sum(-1)
        (kl(p[:-1]) + kl(p[1:])).div(2).mean(-1)

    Args:
        logits: [N, B, C] with N >= 2, floating point, any strides. Computed in fp32 (fp64 for
            fp64 logits, in plain PyTorch). Classes with a logit of -inf in both rows drop out;
            in one row only they give the limit of a probability that goes to 0. A row of
            nothing but -inf counts as uniform.
        reduction: "batchmean" averages over B; "none" keeps every row.
        edge_weight: [E], multiplies the values.
        sample_weight: [B], non-negative or bool: "batchmean" is then the weighted mean
            (0 where all weights are 0); "none" multiplies every row by its weight.
        temperature: divides the logits; between 1e-6 and 1e6. On a GPU each new value compiles the
            kernel anew: divide the logits by one that changes at every step.
        impl: "triton" (on a GPU; on a CPU under TRITON_INTERPRET=1), "torch", or "auto": Triton
            for fp32, bf16 and fp16 logits on a GPU, else PyTorch.

    Returns:
        [E] or [E, B] nats, E = N - 1, each within [0, ln 2] before the weights; fp32 (fp64 for
        fp64 logits). Differentiable once, under any upstream gradient; second derivatives and
        forward-mode differentiation raise.

    Raises:
        TypeError: logits or weights that are not real floating point tensors.
        ValueError: another shape than [N >= 2, B >= 1, C >= 1], weights of another shape or
            device, a temperature out of range, an unknown reduction or impl.
        RuntimeError: impl="triton" where it cannot run; the message says what is missing.

    Example:
        >>> path_js_div(torch.zeros(3, 5, 10))
        tensor([0., 0.])
    """
    reference.check_options(logits, reduction, edge_weight, sample_weight, temperature)
    if not use_triton("the path divergence", impl, logits):
        return reference.path_js_div(
            logits,
            reduction=reduction,
            edge_weight=edge_weight,
            sample_weight=sample_weight,
            temperature=temperature,
        )
    rows = PathJSDiv.apply(logits, float(temperature))
    return reference.reduce_rows(rows, reduction, edge_weight, sample_weight)


def path_js_div_value_and_grad(
    logits: Tensor,
    edge_weight: Optional[Tensor] = None,
    *,
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
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
        sample_weight: [B], non-negative or bool; the means over B are weighted means.
        temperature, impl: as in `path_js_div`.

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
    reference.check_options(logits, "batchmean", edge_weight, sample_weight, temperature)
    if not use_triton("the path divergence", impl, logits):
        return reference.path_js_div_value_and_grad(
            logits, edge_weight, sample_weight=sample_weight, temperature=temperature
        )
    with torch.no_grad():
        if sample_weight is not None:
            upstream = reference.row_weights(logits, edge_weight, sample_weight)
            rows, grad = value_and_grad_op(logits, upstream, False, float(temperature))
            return reference.reduce_rows(rows, "batchmean", None, sample_weight), grad
        if edge_weight is None:
            return value_and_grad_op(logits, None, True, float(temperature))
        upstream = edge_weight.float()[:, None].expand(-1, logits.shape[1])
        return value_and_grad_op(logits, upstream, True, float(temperature))


def js_div(
    p_logits: Tensor,
    q_logits: Tensor,
    *,
    reduction: str = "batchmean",
    sample_weight: Optional[Tensor] = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence between two tensors of logits: a path of two points.

    In exact arithmetic the same as::

        p, q = p_logits.softmax(-1), q_logits.softmax(-1)
        log_m = ((p + q) / 2).log()
        kl = lambda p: F.kl_div(log_m, p, reduction="none").sum(-1)
        (kl(p) + kl(q)).div(2).mean()

    Args:
        p_logits, q_logits: [..., C], floating point, of one shape, dtype and device.
        reduction: "batchmean" averages over everything but C; "none" keeps every row.
        sample_weight: [...], non-negative or bool, as in `path_js_div`.
        temperature, impl: as in `path_js_div`.

    Returns:
        A scalar, or [...], in nats within [0, ln 2]. Differentiable once, in both arguments.

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`, and for arguments that differ in
            shape, dtype or device.

    Example:
        >>> js_div(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
        tensor(0.6931)
    """
    for name, logits in (("p_logits", p_logits), ("q_logits", q_logits)):
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    p, q = ((list(x.shape), x.dtype, x.device) for x in (p_logits, q_logits))
    if p != q:
        raise ValueError(
            f"p_logits and q_logits must have one shape, dtype and device, got {p} and {q}"
        )
    if p_logits.ndim < 1 or p_logits.numel() == 0:
        raise ValueError(f"p_logits must be [..., C] and not empty, got {list(p_logits.shape)}")
    leading = p_logits.shape[:-1]
    if sample_weight is not None:
        if tuple(sample_weight.shape) != tuple(leading):
            raise ValueError(
                f"sample_weight must be {list(leading)}, got {list(sample_weight.shape)}"
            )
        sample_weight = sample_weight.reshape(-1)
    path = torch.stack([x.reshape(-1, x.shape[-1]) for x in (p_logits, q_logits)])
    value = path_js_div(
        path,
        reduction=reduction,
        sample_weight=sample_weight,
        temperature=temperature,
        impl=impl,
    )[0]
    return value if reduction == "batchmean" else value.reshape(leading)


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
            root mean square over B; "none" the distance of every row, whatever its weight.
        sample_weight: [B], non-negative or bool; the mean square is then the weighted one.
        temperature, impl: as in `path_js_div`.

    Returns:
        [E] or [E, B] radians, each within [0, pi]; fp32 (fp64 for fp64 logits).

    Raises:
        TypeError, ValueError, RuntimeError: as `path_js_div`.

    Example:
        >>> path_fisher_rao(torch.tensor([[[1e4, 0.0]], [[0.0, 1e4]]]))
        tensor([3.1416])
    """
    reference.check_options(logits, reduction, None, sample_weight, temperature)
    if not use_triton("the path divergence", impl, logits):
        return reference.path_fisher_rao(
            logits, reduction=reduction, sample_weight=sample_weight, temperature=temperature
        )
    hellinger = rows_op(logits, float(temperature), True)
    return reference.reduce_fisher_rao(hellinger, reduction, sample_weight)
