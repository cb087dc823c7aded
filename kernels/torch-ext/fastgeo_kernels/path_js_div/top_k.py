"""The divergence from a stored teacher, of which only the largest probabilities are known."""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor

from .options import Normalizer, check_floating, check_weight, row_weights
from .public import js_div


def top_k_js_div(
    p_values: Tensor,
    p_indices: Tensor,
    q_logits: Tensor,
    *,
    rest: str = "one",
    beta: float = 0.5,
    reduction: str = "batchmean",
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
    sample_weight: Optional[Tensor] = None,
    normalizer: Normalizer = None,
    impl: str = "auto",
) -> Tensor:
    """`js_div` from a teacher whose log-probabilities are stored for K of C classes.

    What is left of the teacher's mass, 1 - sum exp(p_values), is either "one" class, with which the
    student's mass on all other classes is compared: the divergence of K + 1 classes, which is never
    more than that of all of them. Or it is "spread": every other class has the same part of it.
    Where the teacher is really flat there, this is the full divergence.

    Args:
        p_values: [..., K], log-probabilities, not logits, of K classes.
        p_indices: [..., K], which classes these are; each once.
        q_logits: [..., C], of the student, over the temperature that the teacher was stored at:
            with the rest unknown, that cannot be changed any more.
        rest: "one" or "spread".
        beta, reduction, labels, ignore_index, sample_weight, normalizer, impl: as in `js_div`, with
            the teacher as p.

    Returns:
        As `js_div`; differentiable in q_logits.

    Raises:
        TypeError, ValueError, RuntimeError: as `js_div`, and for values and indices that do not
            fit.

    Example:
        >>> teacher, student = torch.randn(6, 50), torch.randn(6, 50)
        >>> values, indices = teacher.log_softmax(-1).topk(8)
        >>> top_k_js_div(values, indices, student) <= js_div(teacher, student)
        tensor(True)
    """
    check_floating("p_values", p_values)
    check_floating("q_logits", q_logits)
    if rest not in ("one", "spread"):
        raise ValueError(f"rest must be 'one' or 'spread', got {rest!r}")
    shapes = [list(x.shape) for x in (p_values, p_indices, q_logits)]
    leading, classes = q_logits.shape[:-1], q_logits.shape[-1]
    if shapes[0] != shapes[1] or shapes[0][:-1] != list(leading) or shapes[0][-1] >= classes:
        raise ValueError(
            "p_values and p_indices must be [..., K] for q_logits [..., C] with K < C, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    for name, given in (("labels", labels), ("sample_weight", sample_weight)):
        check_weight(name, given, "", leading, q_logits)
    kept = row_weights(sample_weight, torch.float32, labels, ignore_index).kept
    if kept is not None:  # so that no gradient comes from what is computed of other rows
        q_logits = q_logits.masked_fill(~kept[..., None], 0)
    p_values = p_values.detach().to(torch.promote_types(p_values.dtype, torch.float32))
    known = p_values.logsumexp(-1, keepdim=True).clamp(max=0)
    left = (-torch.expm1(known)).log()  # -inf where nothing is left
    if rest == "spread":
        others = left - math.log(classes - p_values.shape[-1])
        p_logits = others.expand(q_logits.shape).scatter(-1, p_indices, p_values)
    else:
        p_logits = torch.cat([p_values, left], -1)
        wide = q_logits.to(torch.promote_types(q_logits.dtype, torch.float32))
        unseen = wide.scatter(-1, p_indices, -math.inf).logsumexp(-1, keepdim=True)
        q_logits = torch.cat([wide.gather(-1, p_indices), unseen], -1)
    return js_div(
        p_logits,
        q_logits,
        beta=beta,
        reduction=reduction,
        labels=labels,
        ignore_index=ignore_index,
        sample_weight=sample_weight,
        normalizer=normalizer,
        impl=impl,
    )
