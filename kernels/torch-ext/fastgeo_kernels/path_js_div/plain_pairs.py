"""The divergence of pairs without Triton: autograd, slices, and double precision on a CPU.

Doubles hold log p - log q of fp32 logits in full, and the definition takes a third of the
operations of the formula in `reference`. Only of rows whose value is nearly 0, or nearly as large
as it can be, value and gradient are small differences in doubles, too: these are computed again by
that formula.
"""

from __future__ import annotations

from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launching import compiling
from . import reference
from .options import FORWARD, REVERSE, How, known

Found = Tuple[Tensor, List[Optional[Tensor]]]  # values; gradients to p and to q, if wanted
Share = Union[None, float, Tensor]
NEAR = 1e-9  # nats; the definition has an error of 2e-16
SATURATED = 1e-6  # of a row's mass on other classes than one


def pair_rows(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    inplace: bool = False,
    share: Share = None,
) -> Tensor:
    """Two [B, C] -> [B], or the sum of these times `share`, a number, [1] or [B]. Differentiable
    once in the logits; those that need no gradient cost none. `inplace`: the backward pass leaves
    the gradient to q_logits in their place."""
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (p_logits, q_logits)]
    fixed = not (isinstance(share, Tensor) and share.requires_grad)
    # torch.func refuses this kind of function, which takes autograd half the time of the other.
    mapped = compiling() or torch._C._are_functorch_transforms_active()
    if fixed and not mapped:
        return _PairRows.apply(p_logits, q_logits, kept, how, inplace, share, wanted)
    rows = _MappedPairRows.apply(p_logits, q_logits, kept, *how, inplace, *wanted)[0]
    return rows if share is None else (rows * share).sum(-1)


def pair_rows_and_grads(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    wanted: Sequence[bool],
    share: Share = None,
) -> Found:
    """[B], and those gradients of each row's own value times its share, [B, C], that are wanted."""
    logits = (p_logits, q_logits)
    exact = torch.promote_types(p_logits.dtype, q_logits.dtype)
    exact = torch.promote_types(exact, torch.float32)
    slices = reference.in_slices(len(p_logits), p_logits)
    doubles = slices is not None and exact != torch.float64
    rows = _mostly_in_doubles if doubles else reference.pair_rows_and_grads
    factors = [slope if share is None else share * slope for slope in how.slopes]

    def run(own: Optional[slice]) -> Found:
        p, q, read = (x if x is None or own is None else x[own] for x in (*logits, kept))
        assert p is not None and q is not None
        values, grads = rows(p, q, read, how, wanted)
        for grad, factor in zip(grads, factors):
            if isinstance(factor, Tensor):
                factor = (factor if own is None or len(factor) == 1 else factor[own])[:, None]
            if grad is not None:
                grad.mul_(factor)
        return values, grads

    if slices is None or len(slices) == 1:
        values, grads = run(None)
        return values.to(exact), [
            None if grad is None else grad.to(x.dtype, memory_format=torch.contiguous_format)
            for grad, x in zip(grads, logits)
        ]
    # Filled as they come: put together at the end they would be there twice.
    values = p_logits.new_empty(len(p_logits), dtype=exact)
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if want else None
        for x, want in zip(logits, wanted)
    ]
    for own in slices:
        values[own], found = run(own)
        for grad, x in zip(grads, found):
            if grad is not None and x is not None:
                grad[own] = x
    return values, grads


class _PairRows(torch.autograd.Function):
    """Computes the gradients that will be wanted with the values, which on a CPU takes little more
    time, and keeps nothing else."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, kept, how: How, inplace, share: Share, wanted) -> Tensor:
        values, grads = pair_rows_and_grads(p_logits, q_logits, kept, how, wanted, share)
        _keep(ctx, grads, q_logits, kept, inplace)
        if share is None:
            return values
        return (values * share).sum() if isinstance(share, Tensor) else values.sum().mul_(share)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Optional[Tensor]):
        return _scaled(ctx, upstream)


class _MappedPairRows(torch.autograd.Function):
    """The rows as torch.compile and torch.func want them."""

    @staticmethod
    def forward(p_logits, q_logits, kept, temperature, beta, inplace, p_wanted, q_wanted):
        how, wanted = How(temperature, beta), (p_wanted, q_wanted)
        values, grads = pair_rows_and_grads(p_logits, q_logits, kept, how, wanted)
        return values, *grads

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *grads = output
        ctx.mark_non_differentiable(*(grad for grad in grads if grad is not None))
        _, q_logits, kept, _, _, inplace, _, _ = inputs
        _keep(ctx, grads, q_logits, kept, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Optional[Tensor], *_):
        return *_scaled(ctx, upstream), None

    @staticmethod
    def vmap(info, in_dims, p_logits, q_logits, kept, temperature, beta, inplace, *wanted):
        """The mapped dimension joins the batch. Gradients may be wanted inside of the map, or
        outside, where the tensors tell."""
        size = info.batch_size

        def fold(tensor, dim):
            if tensor is None:
                return None
            tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        *logits, kept = (fold(*each) for each in zip((p_logits, q_logits, kept), in_dims))
        either = [inside or x.requires_grad for inside, x in zip(wanted, logits)]
        rows, *grads = _MappedPairRows.apply(*logits, kept, temperature, beta, False, *either)
        grads = [grad if inside else None for inside, grad in zip(wanted, grads)]
        results = [None if x is None else x.unflatten(0, (size, -1)) for x in (rows, *grads)]
        return tuple(results), tuple(None if x is None else 0 for x in results)


def _keep(ctx, grads, q_logits: Tensor, kept: Optional[Tensor], inplace: bool) -> None:
    over = q_logits if inplace and grads[1] is not None else None
    ctx.save_for_backward(*grads, kept, over)
    ctx.set_materialize_grads(False)


def _scaled(ctx, upstream: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The gradients to seven arguments."""
    p_grad, q_grad, kept, over = ctx.saved_tensors
    if upstream is None:
        return (None,) * 7
    if upstream.ndim:
        upstream = reference.only(kept, upstream)[:, None]
    elif over is None and known(upstream) == 1:  # as of a loss itself
        return p_grad, q_grad, *(None,) * 5
    if over is not None:
        q_grad = torch.mul(q_grad, upstream, out=over.detach())
    elif q_grad is not None:
        q_grad = (q_grad * upstream).to(q_grad.dtype)
    if p_grad is not None:
        p_grad = (p_grad * upstream).to(p_grad.dtype)
    return p_grad, q_grad, *(None,) * 5


# --- In double precision --------------------------------------------------------------------------


def _mostly_in_doubles(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    wanted: Sequence[bool],
) -> Found:
    values, grads = _in_doubles(p_logits, q_logits, kept, how, wanted)
    most = 1e20 if how.kind in (FORWARD, REVERSE) else how.largest - NEAR  # of KL: not infinite
    lowest, highest = (known(x) for x in values.aminmax())
    if lowest is None or highest is None:
        return reference.pair_rows_and_grads(p_logits, q_logits, kept, how, wanted)
    if lowest > NEAR and highest < most:
        return values, grads
    again = ~((values > NEAR) & (values < most))  # NaN as well
    if kept is not None:
        again &= kept
    rows = again.nonzero().squeeze(1)
    if len(rows):
        own, own_grads = reference.pair_rows_and_grads(
            p_logits[rows], q_logits[rows], None, how, wanted
        )
        values[rows] = own.to(values.dtype)
        for grad, x in zip(grads, own_grads):
            if grad is not None and x is not None:
                grad[rows] = x.to(grad.dtype)
    return values, grads


def _in_doubles(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    wanted: Sequence[bool],
) -> Found:
    """By definition."""
    logs = reference.readable_pair(p_logits, q_logits, kept, torch.float64)  # [2, B, C]
    if how.temperature != 1:
        logs.sub_(logs.amax(-1, keepdim=True)).mul_(1 / how.temperature)
    # As they lie in memory: PyTorch would copy them.
    logs = logs.log_softmax(-1) if logs.is_contiguous() else logs.mT.log_softmax(1).mT
    p = logs.exp()
    grads: List[Optional[Tensor]] = [None, None]
    if how.kind in (FORWARD, REVERSE):
        here, there = (0, 1) if how.kind == FORWARD else (1, 0)
        term = logs[here].sub_(logs[there]).mul_(p[here])
        value = term.sum(-1, keepdim=True)
        if wanted[here]:
            grads[here] = term.addcmul_(p[here], value, value=-1)
        if wanted[there]:
            grads[there] = p[there] - p[here]
    else:
        probabilities = p.unbind(0)
        logs.sub_(torch.lerp(probabilities[1], probabilities[0], how.beta).log_()).mul_(p)
        kls = logs.sum(-1, keepdim=True).unbind(0)
        value = torch.lerp(kls[1], kls[0], how.beta)
        for i, (row, kl) in enumerate(zip(probabilities, kls)):
            if wanted[i]:
                grads[i] = logs[i].addcmul_(row, kl, value=-1)
    # The class with nearly all of a row: its own closed form cancels.
    if any(wanted) and (known(p.amax()) or 1) >= 1 - SATURATED:
        for grad, row in zip(grads, p.unbind(0)):
            if grad is not None:
                reference.close(grad, row)
    return value.squeeze(-1), grads
