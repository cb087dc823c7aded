"""The divergence behind the last linear layer of a student: its logits never exist all at once.

Tokens go through the head, the divergence and back to the head some at a time, in the forward pass;
what is kept is the gradients to the hidden states and to the head, which the backward pass scales.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..launching import use_triton
from . import plain_pairs
from .operators import pair_grads_op, pair_values_op
from .options import (
    How,
    Normalizer,
    check_floating,
    check_how,
    check_normalizer,
    check_weight,
    row_weights,
    shares,
)

LOGITS = 1 << 26  # numbers of a slice: 128 MiB in half precision, and 400 tokens of 150,000 classes


def fused_linear_js_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Optional[Tensor] = None,
    teacher_weight: Optional[Tensor] = None,
    *,
    student_bias: Optional[Tensor] = None,
    teacher_bias: Optional[Tensor] = None,
    teacher_logits: Optional[Tensor] = None,
    softcap: Optional[float] = None,
    beta: float = 0.5,
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
    sample_weight: Optional[Tensor] = None,
    normalizer: Normalizer = None,
    temperature: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """`js_div` of a teacher and a student from their hidden states, in memory for some tokens.

    In exact arithmetic the same as::

        student_logits = cap(F.linear(student_hidden, student_weight, student_bias))
        teacher_logits = cap(F.linear(teacher_hidden, teacher_weight, teacher_bias))
        js_div(teacher_logits, student_logits, beta=beta, ...)

    with cap(x) = softcap * tanh(x / softcap), if there is a softcap.

    Args:
        student_hidden: [..., H].
        student_weight, student_bias: [C, H] and [C], of the student's last layer.
        teacher_hidden, teacher_weight, teacher_bias: of the teacher, whose H may differ; or
        teacher_logits: [..., C], in place of these. A teacher gets no gradient.
        softcap: bound of the logits that are computed here, as of Gemma 2.
        beta, labels, ignore_index, sample_weight, normalizer, temperature, impl: as in `js_div`,
            of which the teacher is p and the student q: beta = 0 is KL(teacher || student).

    Returns:
        A scalar, in nats; fp32 (fp64 for fp64 hidden states). Differentiable once, in the student's
        hidden states, weight and bias. The forward pass computes the gradients that are wanted as
        well, from the logits of 67 million / C tokens at a time. torch.func.vmap raises.

    Raises:
        TypeError, ValueError, RuntimeError: as `js_div`, for shapes that do not fit, and for a
            teacher that is given twice or not at all.

    Example:
        >>> hidden, weight = torch.randn(6, 8), torch.randn(50, 8)
        >>> fused_linear_js_div(hidden, weight, hidden, weight)
        tensor(0.)
    """
    how = How(temperature, beta)
    check_how("batchmean", how)
    check_normalizer(normalizer, "batchmean")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    student = _head("student", student_hidden, student_weight, student_bias)
    if (teacher_hidden is None) == (teacher_logits is None):
        raise ValueError("give the teacher by teacher_hidden and its head, or by teacher_logits")
    if teacher_logits is not None:
        check_floating("teacher_logits", teacher_logits)
        shape, teacher = list(teacher_logits.shape), _Head(_rows(teacher_logits))
    else:
        teacher = _head("teacher", teacher_hidden, teacher_weight, teacher_bias)
        assert teacher_hidden is not None and teacher_weight is not None
        shape = [*teacher_hidden.shape[:-1], len(teacher_weight)]
    leading = student_hidden.shape[:-1]
    if shape != [*leading, len(student_weight)]:
        raise ValueError(
            f"the teacher's logits must be {[*leading, len(student_weight)]}, as the student's, "
            f"got {shape}"
        )
    for name, given in (("labels", labels), ("sample_weight", sample_weight)):
        check_weight(name, given, "", leading, student_hidden)
    triton = use_triton("fused_linear_js_div", impl, student_hidden)
    labels, sample_weight = (None if t is None else t.reshape(-1) for t in (labels, sample_weight))
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    weights = row_weights(sample_weight, dtype, labels, ignore_index)
    share = shares(weights, normalizer, student.x[:, 0]).detach().expand(len(student.x))
    on = torch.is_grad_enabled()
    wanted = [on and tensor is not None and tensor.requires_grad for tensor in student]
    numbers = (softcap, *map(float, how))
    return _FusedLinear.apply(*student, *teacher, share, weights.kept, *numbers, triton, wanted)[0]


class _Head(NamedTuple):
    """What logits [B, C] are computed from; the logits themselves where there is no weight."""

    x: Tensor  # [B, H]
    weight: Optional[Tensor] = None  # [C, H]
    bias: Optional[Tensor] = None  # [C]

    def logits(self, softcap: Optional[float]) -> Tuple[Tensor, Optional[Tensor]]:
        """And their derivative to what they are capped from."""
        if self.weight is None:
            return self.x, None
        logits = F.linear(self.x, self.weight, self.bias)
        if softcap is None:
            return logits, None
        tanh = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap).tanh()
        return softcap * tanh, 1 - tanh.square()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _head(
    name: str, hidden: Optional[Tensor], weight: Optional[Tensor], bias: Optional[Tensor]
) -> _Head:
    for word, tensor in ((f"{name}_hidden", hidden), (f"{name}_weight", weight)):
        check_floating(word, tensor)
    assert hidden is not None and weight is not None
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}_weight must be [C, H] and {name}_hidden [..., H], got {list(weight.shape)} "
            f"and {list(hidden.shape)}"
        )
    if hidden.numel() == 0:
        raise ValueError(f"{name}_hidden must not be empty, got {list(hidden.shape)}")
    if bias is not None and tuple(bias.shape) != (len(weight),):
        raise ValueError(f"{name}_bias must be [{len(weight)}], got {list(bias.shape)}")
    return _Head(_rows(hidden), weight, bias)


class _FusedLinear(torch.autograd.Function):
    """The value, and the gradients to hidden states, weight and bias as far as they are wanted."""

    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        teacher: Tensor,
        teacher_weight: Optional[Tensor],
        teacher_bias: Optional[Tensor],
        share: Tensor,
        kept: Optional[Tensor],
        softcap: Optional[float],
        temperature: float,
        beta: float,
        triton: bool,
        wanted: List[bool],
    ):
        how = How(temperature, beta)
        divergence = _triton_pair if triton else _torch_pair
        exact = torch.promote_types(weight.dtype, torch.float32)
        value = share.new_zeros(())
        hidden_grad = torch.empty_like(hidden) if wanted[0] else None
        weight_grad = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
        bias_grad = weight.new_zeros(len(weight), dtype=exact) if wanted[2] else None
        size = max(1, LOGITS // len(weight))
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            own = None if kept is None else kept[rows]
            x = hidden[rows]
            if own is not None:  # what is not read may be NaN, and 0 times it as well
                x = x.masked_fill(~own[:, None], 0)
            logits, slope = _Head(x, weight, bias).logits(softcap)
            given, _ = _Head(teacher[rows], teacher_weight, teacher_bias).logits(softcap)
            values, grad = divergence(given, logits, own, how, share[rows], any(wanted))
            value += (values * share[rows]).sum()
            if grad is None:
                continue
            grad = (grad if slope is None else grad * slope).to(x.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = grad @ weight
            if weight_grad is not None:
                weight_grad += grad.t() @ x
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=exact)
        weight_grad = None if weight_grad is None else weight_grad.to(weight.dtype)
        bias_grad = None if bias_grad is None or bias is None else bias_grad.to(bias.dtype)
        return value, hidden_grad, weight_grad, bias_grad

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        grads = output[1:]
        ctx.mark_non_differentiable(*(grad for grad in grads if grad is not None))
        ctx.save_for_backward(*grads)
        ctx.set_materialize_grads(False)
        ctx.others = len(inputs) - len(grads)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Optional[Tensor], *_):
        scaled = [
            None if grad is None or upstream is None else (grad * upstream).to(grad.dtype)
            for grad in ctx.saved_tensors
        ]
        return (*scaled, *(None,) * ctx.others)


def _torch_pair(
    teacher: Tensor, logits: Tensor, kept: Optional[Tensor], how: How, share: Tensor, wanted: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    both = (False, wanted)
    values, grads = plain_pairs.pair_rows_and_grads(teacher, logits, kept, how, both, share)
    return values, grads[1]


def _triton_pair(
    teacher: Tensor, logits: Tensor, kept: Optional[Tensor], how: How, share: Tensor, wanted: bool
) -> Tuple[Tensor, Optional[Tensor]]:
    values = pair_values_op(teacher, logits, kept, *how)
    if not wanted:
        return values, None
    return values, pair_grads_op(teacher, logits, share, kept, *how, False, True)[1]
