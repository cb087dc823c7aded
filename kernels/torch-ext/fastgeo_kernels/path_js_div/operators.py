"""The launches as operators: opaque to torch.compile, known to vmap, with a first derivative."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch, launch_pair
from .options import How

# The module's own name, so that two copies of this folder in one process do not collide.
_NAMESPACE = __name__.replace(".", "_")


def _rows(
    logits: Tensor, kept: Optional[Tensor], temperature: float, beta: float, fisher: bool
) -> Tensor:
    return launch(logits, kept, How(temperature, beta), "fisher" if fisher else "rows")[0]


def _grad(
    logits: Tensor, upstream: Tensor, kept: Optional[Tensor], temperature: float, beta: float
) -> Tensor:
    return launch(logits, kept, How(temperature, beta), "none", upstream, grad=True)[1]


def _value_and_grad(
    logits: Tensor,
    upstream: Optional[Tensor],
    kept: Optional[Tensor],
    mean: bool,
    temperature: float,
    beta: float,
) -> Tuple[Tensor, Tensor]:
    value = "mean" if mean else "rows"
    return launch(logits, kept, How(temperature, beta), value, upstream, grad=True)


rows_op = torch.library.custom_op(
    f"{_NAMESPACE}::rows",
    _rows,
    mutates_args=(),
    schema="(Tensor logits, Tensor? kept, float temperature, float beta, bool fisher) -> Tensor",
)
grad_op = torch.library.custom_op(
    f"{_NAMESPACE}::grad",
    _grad,
    mutates_args=(),
    schema="(Tensor logits, Tensor upstream, Tensor? kept, float temperature, float beta) "
    "-> Tensor",
)
value_and_grad_op = torch.library.custom_op(
    f"{_NAMESPACE}::value_and_grad",
    _value_and_grad,
    mutates_args=(),
    schema="(Tensor logits, Tensor? upstream, Tensor? kept, bool mean, float temperature, "
    "float beta) -> (Tensor, Tensor)",
)


@rows_op.register_fake
def _(logits, kept, temperature, beta, fisher):
    points, batch, _ = logits.shape
    return logits.new_empty((points - 1, batch), dtype=torch.float32)


@grad_op.register_fake
def _(logits, upstream, kept, temperature, beta):
    return logits.new_empty(logits.shape)


@value_and_grad_op.register_fake
def _(logits, upstream, kept, mean, temperature, beta):
    points, batch, _ = logits.shape
    shape = (points - 1,) if mean else (points - 1, batch)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(logits.shape)


def _fold(tensor: Optional[Tensor], dim: Optional[int], size: int, batch: int = 1):
    """Moves the dimension that vmap maps over into the batch, which is dimension `batch`."""
    if tensor is None:
        return None
    if dim is None:
        shape = list(tensor.shape)
        tensor = tensor.unsqueeze(batch).expand(*shape[:batch], size, *shape[batch:])
    else:
        tensor = tensor.movedim(dim, batch)
    return tensor.flatten(batch, batch + 1)


@rows_op.register_vmap
def _(info, in_dims, logits, kept, temperature, beta, fisher):
    size = info.batch_size
    logits, kept = _fold(logits, in_dims[0], size), _fold(kept, in_dims[1], size, 0)
    return rows_op(logits, kept, temperature, beta, fisher).unflatten(1, (size, -1)), 1


@grad_op.register_vmap
def _(info, in_dims, logits, upstream, kept, temperature, beta):
    size = info.batch_size
    logits, upstream = (_fold(t, d, size) for t, d in zip((logits, upstream), in_dims))
    kept = _fold(kept, in_dims[2], size, 0)
    return grad_op(logits, upstream, kept, temperature, beta).unflatten(1, (size, -1)), 1


@value_and_grad_op.register_vmap
def _(info, in_dims, logits, upstream, kept, mean, temperature, beta):
    size = info.batch_size
    logits, upstream = (_fold(t, d, size) for t, d in zip((logits, upstream), in_dims))
    kept = _fold(kept, in_dims[2], size, 0)
    if mean:
        if upstream is None:
            ones = logits.new_ones((1, 1), dtype=torch.float32)
            upstream = ones.expand(logits.shape[0] - 1, logits.shape[1])
        upstream = upstream / (logits.shape[1] // size)
    value, grad = value_and_grad_op(logits, upstream, kept, False, temperature, beta)
    value = value.unflatten(1, (size, -1))
    return (value.mean(2) if mean else value, grad.unflatten(1, (size, -1))), (1, 1)


class PathRows(torch.autograd.Function):
    """[N, B, C] logits -> [E, B] nats, any upstream gradient, first order only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, kept: Optional[Tensor], temperature: float, beta: float) -> Tensor:
        return rows_op(logits, kept, temperature, beta, False)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, kept, *ctx.how = inputs
        ctx.save_for_backward(logits, kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, kept = ctx.saved_tensors
        return grad_op(logits, upstream, kept, *ctx.how), None, None, None


# --- Pairs ----------------------------------------------------------------------------------------


def _pair_values(
    p_logits: Tensor, q_logits: Tensor, kept: Optional[Tensor], temperature: float, beta: float
) -> Tensor:
    return launch_pair(p_logits, q_logits, kept, How(temperature, beta))


def _pair_grads(
    p_logits: Tensor,
    q_logits: Tensor,
    upstream: Tensor,
    kept: Optional[Tensor],
    temperature: float,
    beta: float,
    p_wanted: bool,
    q_wanted: bool,
) -> Tuple[Tensor, Tensor]:
    p_grad = p_logits.new_empty(p_logits.shape if p_wanted else (0,))
    q_grad = q_logits.new_empty(q_logits.shape if q_wanted else (0,))
    given = p_grad if p_wanted else None, q_grad if q_wanted else None
    launch_pair(p_logits, q_logits, kept, How(temperature, beta), upstream, *given)
    return p_grad, q_grad


pair_values_op = torch.library.custom_op(
    f"{_NAMESPACE}::pair_values",
    _pair_values,
    mutates_args=(),
    schema="(Tensor p_logits, Tensor q_logits, Tensor? kept, float temperature, float beta) "
    "-> Tensor",
)
pair_grads_op = torch.library.custom_op(
    f"{_NAMESPACE}::pair_grads",
    _pair_grads,
    mutates_args=(),
    schema="(Tensor p_logits, Tensor q_logits, Tensor upstream, Tensor? kept, float temperature, "
    "float beta, bool p_wanted, bool q_wanted) -> (Tensor, Tensor)",
)


def _pair_grads_over(
    p_logits: Tensor,
    q_logits: Tensor,
    upstream: Tensor,
    kept: Optional[Tensor],
    temperature: float,
    beta: float,
    p_wanted: bool,
) -> Tensor:
    p_grad = p_logits.new_empty(p_logits.shape if p_wanted else (0,))
    how, given = How(temperature, beta), p_grad if p_wanted else None
    launch_pair(p_logits, q_logits, kept, how, upstream, given, q_logits)
    return p_grad


# Writes the gradient to q_logits over them; returns that to p_logits.
pair_grads_over_op = torch.library.custom_op(
    f"{_NAMESPACE}::pair_grads_over",
    _pair_grads_over,
    mutates_args=("q_logits",),
    schema="(Tensor p_logits, Tensor(a!) q_logits, Tensor upstream, Tensor? kept, "
    "float temperature, float beta, bool p_wanted) -> Tensor",
)


@pair_grads_over_op.register_fake
def _(p_logits, q_logits, upstream, kept, temperature, beta, p_wanted):
    return p_logits.new_empty(p_logits.shape if p_wanted else (0,))


@pair_values_op.register_fake
def _(p_logits, q_logits, kept, temperature, beta):
    return p_logits.new_empty(p_logits.shape[:1], dtype=torch.float32)


@pair_grads_op.register_fake
def _(p_logits, q_logits, upstream, kept, temperature, beta, p_wanted, q_wanted):
    return (
        p_logits.new_empty(p_logits.shape if p_wanted else (0,)),
        q_logits.new_empty(q_logits.shape if q_wanted else (0,)),
    )


@pair_values_op.register_vmap
def _(info, in_dims, p_logits, q_logits, kept, temperature, beta):
    size = info.batch_size
    tensors = (_fold(t, d, size, 0) for t, d in zip((p_logits, q_logits, kept), in_dims))
    return pair_values_op(*tensors, temperature, beta).unflatten(0, (size, -1)), 0


@pair_grads_op.register_vmap
def _(info, in_dims, p_logits, q_logits, upstream, kept, temperature, beta, *wanted):
    size = info.batch_size
    tensors = (p_logits, q_logits, upstream, kept)
    tensors = (_fold(t, d, size, 0) for t, d in zip(tensors, in_dims))
    grads = pair_grads_op(*tensors, temperature, beta, *wanted)
    return tuple(
        grad.unflatten(0, (size, -1)) if want else grad.expand(size, 0)
        for grad, want in zip(grads, wanted)
    ), (0, 0)


class PairRows(torch.autograd.Function):
    """Two [B, C] -> [B] nats. Keeps the two arguments, and computes the gradients that are wanted
    from them: to write these in the forward pass and read them again would take as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p_logits, q_logits, kept, temperature: float, beta: float, inplace: bool) -> Tensor:
        return pair_values_op(p_logits, q_logits, kept, temperature, beta)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, temperature, beta, ctx.inplace = inputs
        ctx.how = temperature, beta
        ctx.save_for_backward(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        p_logits, q_logits, kept = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        given = (p_logits, q_logits, upstream, kept, *ctx.how)
        if ctx.inplace and wanted[1]:
            grads = pair_grads_over_op(*given, wanted[0]), q_logits.detach()
        else:
            grads = pair_grads_op(*given, *wanted)
        found = (grad if want else None for grad, want in zip(grads, wanted))
        return (*found, None, None, None, None)
