"""The divergence of pairs without Triton: autograd, slices, and double precision on a CPU.

Logits of up to 32 bits differ by so much that doubles hold log p - log m in full, and the definition
takes a third of the operations of the formula in `reference`. Only the value of a row that is nearly
0 or nearly as large as it can be is the small difference of larger numbers in doubles, too, and so is
a gradient there: such rows are computed again by that formula.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .options import FORWARD, REVERSE, How, known

Found = Tuple[Tensor, Optional[Tensor], Optional[Tensor]]  # values, gradients to p and to q
NEAR = 1e-9  # nats; the definition has an error of 2e-16


def pair_rows(
    p_logits: Tensor, q_logits: Tensor, kept: Optional[Tensor], how: How, inplace: bool = False
) -> Tensor:
    """Two [B, C] -> [B], differentiable once; an argument without a gradient costs none. `inplace`:
    the backward pass leaves the gradient to q_logits in their place."""
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (p_logits, q_logits)]
    given = (p_logits, q_logits, kept, *how, inplace, *wanted)
    if torch.compiler.is_compiling():
        return _MappedPairRows.apply(*given)[0]
    try:
        return _PairRows.apply(*given)
    except RuntimeError as error:
        # What torch.func says of the faster kind of function, which it cannot transform.
        if "setup_context" not in str(error):
            raise
        return _MappedPairRows.apply(*given)[0]


def pair_rows_and_grads(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    p_wanted: bool,
    q_wanted: bool,
) -> Found:
    """[B], and the gradients of each row's own value over `how.slopes`, [B, C], that are wanted."""
    wanted, logits = (p_wanted, q_wanted), (p_logits, q_logits)
    dtypes = [torch.promote_types(p_logits.dtype, q_logits.dtype), *(x.dtype for x in logits)]
    dtypes[0] = torch.promote_types(dtypes[0], torch.float32)
    if p_logits.device.type != "cpu" or torch.compiler.is_compiling():
        found = reference.pair_rows_and_grads(*logits, kept, how, wanted)
        values, *grads = (x if x is None else x.to(dtype) for x, dtype in zip(found, dtypes))
        return values, grads[0], grads[1]
    rows = reference.pair_rows_and_grads if dtypes[0] == torch.float64 else _mostly_in_doubles
    batch = len(p_logits)
    # Filled as they come: put together at the end they would be there twice.
    values = p_logits.new_empty(batch, dtype=dtypes[0])
    grads = [
        torch.empty(x.shape, dtype=x.dtype) if want else None for x, want in zip(logits, wanted)
    ]
    for start, size in reference.in_slices(batch, p_logits):
        part = slice(start, start + size)
        own = None if kept is None else kept[part]
        found = rows(p_logits[part], q_logits[part], own, how, wanted)
        for whole, x in zip((values, *grads), found):
            if whole is not None:
                whole[part] = x
    return values, grads[0], grads[1]


class _PairRows(torch.autograd.Function):
    """Computes the gradients that will be wanted with the values, which on a CPU takes little more
    time, and keeps nothing else."""

    @staticmethod
    def forward(ctx, p_logits, q_logits, kept, temperature, beta, inplace, *wanted) -> Tensor:
        how = How(temperature, beta)
        values, *grads = pair_rows_and_grads(p_logits, q_logits, kept, how, *wanted)
        _keep(ctx, grads, q_logits, kept, how, inplace)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        return _scaled(ctx, upstream)


class _MappedPairRows(torch.autograd.Function):
    """The same as torch.compile and torch.func want it, which takes autograd twice the time."""

    @staticmethod
    def forward(p_logits, q_logits, kept, temperature, beta, inplace, p_wanted, q_wanted):
        how = How(temperature, beta)
        return pair_rows_and_grads(p_logits, q_logits, kept, how, p_wanted, q_wanted)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *grads = output
        ctx.mark_non_differentiable(*(grad for grad in grads if grad is not None))
        _, q_logits, kept, *how, inplace, _, _ = inputs
        _keep(ctx, grads, q_logits, kept, How(*how), inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        return _scaled(ctx, upstream)

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


def _keep(ctx, grads, q_logits: Tensor, kept: Optional[Tensor], how: How, inplace: bool) -> None:
    over = q_logits if inplace and grads[1] is not None else None
    ctx.save_for_backward(*grads, kept, over)
    ctx.set_materialize_grads(False)
    ctx.slopes = how.slopes


def _scaled(ctx, upstream: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
    """The gradients to the eight arguments."""
    *grads, kept, over = ctx.saved_tensors
    results: List[Optional[Tensor]] = [None] * 8
    if upstream is None:
        return tuple(results)
    upstream = reference.only(kept, upstream)[:, None]
    for i, (grad, slope) in enumerate(zip(grads, ctx.slopes)):
        if grad is not None and over is not None and i == 1:
            results[i] = torch.mul(grad, upstream * slope, out=over.detach())
        elif grad is not None:
            results[i] = (grad * (upstream * slope)).to(grad.dtype)
    return tuple(results)


# --- In double precision --------------------------------------------------------------------------


def _mostly_in_doubles(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    wanted: Tuple[bool, bool],
) -> Found:
    found = _in_doubles(p_logits, q_logits, kept, how, wanted)
    values = found[0]
    most = 1e20 if how.kind in (FORWARD, REVERSE) else how.largest - NEAR  # of KL: not infinite
    lowest, highest = (known(x) for x in values.aminmax())
    if lowest is None or highest is None:
        return reference.pair_rows_and_grads(p_logits, q_logits, kept, how, wanted)
    if lowest > NEAR and highest < most:
        return found
    again = ~((values > NEAR) & (values < most))  # NaN as well
    if kept is not None:
        again &= kept
    rows = again.nonzero().squeeze(1)
    if len(rows):
        own = None if kept is None else kept[rows]
        other = reference.pair_rows_and_grads(p_logits[rows], q_logits[rows], own, how, wanted)
        for whole, x in zip(found, other):
            if whole is not None:
                whole[rows] = x.to(whole.dtype)
    return found


def _in_doubles(
    p_logits: Tensor,
    q_logits: Tensor,
    kept: Optional[Tensor],
    how: How,
    wanted: Tuple[bool, bool],
) -> Found:
    """By definition."""
    logs = reference.readable_pair(p_logits, q_logits, kept, torch.float64)  # [2, B, C]
    logs.sub_(logs.amax(-1, keepdim=True))
    if how.temperature != 1:
        logs.mul_(1 / how.temperature)
    p = logs.exp()
    total = p.sum(-1, keepdim=True)
    p.div_(total)
    logs.sub_(total.log())
    grads: List[Optional[Tensor]] = [None, None]
    if how.kind in (FORWARD, REVERSE):
        here, there = (0, 1) if how.kind == FORWARD else (1, 0)
        terms = logs[here].sub_(logs[there]).mul_(p[here])
        value = terms.sum(-1, keepdim=True)
        if wanted[here]:
            grads[here] = terms.addcmul_(p[here], value, value=-1)
        if wanted[there]:
            grads[there] = p[there] - p[here]
    else:
        m = torch.lerp(p[1], p[0], how.beta)
        terms = logs.sub_(m.log_()).mul_(p)
        kl = terms.sum(-1, keepdim=True)
        value = torch.lerp(kl[1], kl[0], how.beta)
        for i in range(2):
            if wanted[i]:
                grads[i] = terms[i].addcmul_(p[i], kl[i], value=-1)
    p_grad, q_grad = (
        None if grad is None else reference.closed(grad, p[i], total[i])
        for i, grad in enumerate(grads)
    )
    return value.squeeze(-1), p_grad, q_grad
