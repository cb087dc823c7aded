"""The launches as operators: opaque to torch.compile, known to vmap, with a first derivative."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch

# The module's own name, so that two copies of this folder in one process do not collide.
_NAMESPACE = __name__.replace(".", "_")


def _rows(logits: Tensor, temperature: float, fisher: bool) -> Tensor:
    return launch(logits, temperature, "fisher" if fisher else "rows")[0]


def _grad(logits: Tensor, upstream: Tensor, temperature: float) -> Tensor:
    return launch(logits, temperature, "none", upstream, grad=True)[1]


def _value_and_grad(
    logits: Tensor, upstream: Optional[Tensor], mean: bool, temperature: float
) -> Tuple[Tensor, Tensor]:
    return launch(logits, temperature, "mean" if mean else "rows", upstream, grad=True)


rows_op = torch.library.custom_op(
    f"{_NAMESPACE}::rows",
    _rows,
    mutates_args=(),
    schema="(Tensor logits, float temperature, bool fisher) -> Tensor",
)
grad_op = torch.library.custom_op(
    f"{_NAMESPACE}::grad",
    _grad,
    mutates_args=(),
    schema="(Tensor logits, Tensor upstream, float temperature) -> Tensor",
)
value_and_grad_op = torch.library.custom_op(
    f"{_NAMESPACE}::value_and_grad",
    _value_and_grad,
    mutates_args=(),
    schema="(Tensor logits, Tensor? upstream, bool mean, float temperature) -> (Tensor, Tensor)",
)


@rows_op.register_fake
def _(logits, temperature, fisher):
    points, batch, _ = logits.shape
    return logits.new_empty((points - 1, batch), dtype=torch.float32)


@grad_op.register_fake
def _(logits, upstream, temperature):
    return logits.new_empty(logits.shape)


@value_and_grad_op.register_fake
def _(logits, upstream, mean, temperature):
    points, batch, _ = logits.shape
    shape = (points - 1,) if mean else (points - 1, batch)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(logits.shape)


def _fold(tensor: Tensor, dim: Optional[int], size: int) -> Tensor:
    """Moves the dimension that vmap maps over into the batch, which is dimension 1."""
    if dim is None:
        tensor = tensor.unsqueeze(1).expand(-1, size, *tensor.shape[1:])
    else:
        tensor = tensor.movedim(dim, 1)
    return tensor.flatten(1, 2)


@rows_op.register_vmap
def _(info, in_dims, logits, temperature, fisher):
    rows = rows_op(_fold(logits, in_dims[0], info.batch_size), temperature, fisher)
    return rows.unflatten(1, (info.batch_size, -1)), 1


@grad_op.register_vmap
def _(info, in_dims, logits, upstream, temperature):
    logits = _fold(logits, in_dims[0], info.batch_size)
    upstream = _fold(upstream, in_dims[1], info.batch_size)
    return grad_op(logits, upstream, temperature).unflatten(1, (info.batch_size, -1)), 1


@value_and_grad_op.register_vmap
def _(info, in_dims, logits, upstream, mean, temperature):
    logits = _fold(logits, in_dims[0], info.batch_size)
    if upstream is not None:
        upstream = _fold(upstream, in_dims[1], info.batch_size)
    elif mean:
        upstream = logits.new_ones((1, 1), dtype=torch.float32).expand(
            logits.shape[0] - 1, logits.shape[1]
        )
    if mean:
        upstream = upstream / (logits.shape[1] // info.batch_size)
    value, grad = value_and_grad_op(logits, upstream, False, temperature)
    value = value.unflatten(1, (info.batch_size, -1))
    return (value.mean(2) if mean else value, grad.unflatten(1, (info.batch_size, -1))), (1, 1)


class PathJSDiv(torch.autograd.Function):
    """[N, B, C] logits -> [E, B] nats, any upstream gradient, first order only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, temperature: float) -> Tensor:
        return rows_op(logits, temperature, False)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, ctx.temperature = inputs
        ctx.save_for_backward(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (logits,) = ctx.saved_tensors
        return grad_op(logits, upstream, ctx.temperature), None
