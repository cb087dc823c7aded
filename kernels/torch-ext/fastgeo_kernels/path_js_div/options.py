"""What callers may ask for: checks of arguments, weights of rows, means over the batch."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..launching import compiling

HALF, SKEW, FORWARD, REVERSE = range(4)  # the four formulas, by beta: 1/2, between, 0 and 1


class How(NamedTuple):
    """Which divergence of p = softmax(x / temperature) and q = softmax(y / temperature) is meant:
    for beta = 0 KL(p || q), for 1 KL(q || p), and between beta KL(p || m) + (1 - beta) KL(q || m)
    with m = beta p + (1 - beta) q."""

    temperature: float = 1.0
    beta: float = 0.5

    @property
    def kind(self) -> int:
        return {0.5: HALF, 0.0: FORWARD, 1.0: REVERSE}.get(self.beta, SKEW)

    @property
    def shares(self) -> Tuple[float, float]:
        """What the gradients to the logits of p and of q are multiplied with."""
        inside = 0 < self.beta < 1
        return (self.beta, 1 - self.beta) if inside else (1.0, 1.0)

    @property
    def largest(self) -> float:
        """Of all values; of a KL divergence, which has no bound, 0."""
        (a, b), (p_limit, q_limit) = self.shares, self.limits
        return a * p_limit + b * q_limit

    @property
    def slopes(self) -> Tuple[float, float]:
        """The same of logits that are not divided by the temperature yet."""
        return self.shares[0] / self.temperature, self.shares[1] / self.temperature

    @property
    def limits(self) -> Tuple[float, float]:
        """log(p / m) where q is 0, and log(q / m) where p is 0; infinite for KL, here 0."""
        inside = 0 < self.beta < 1
        return (-math.log(self.beta), -math.log1p(-self.beta)) if inside else (0.0, 0.0)


# --- Checks ---------------------------------------------------------------------------------------


def check_path(
    logits: Tensor,
    reduction: str,
    edge_weight: Optional[Tensor],
    sample_weight: Optional[Tensor],
    how: How,
) -> None:
    """Raises TypeError or ValueError that says what was expected and what came."""
    check_floating("logits", logits)
    if logits.ndim != 3 or logits.shape[0] < 2 or 0 in logits.shape:
        raise ValueError(
            f"logits must be [N, B, C] with N >= 2, B >= 1, C >= 1, got {list(logits.shape)}"
        )
    check_how(reduction, how)
    check_weight("edge_weight", edge_weight, "[E] = ", (logits.shape[0] - 1,), logits)
    check_weight("sample_weight", sample_weight, "[B] = ", (logits.shape[1],), logits)


def check_floating(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")


def check_how(reduction: str, how: How) -> None:
    if reduction not in ("batchmean", "none"):
        raise ValueError(f"reduction must be 'batchmean' or 'none', got {reduction!r}")
    for name, number in zip(how._fields, how):
        if isinstance(number, (bool, Tensor)) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a Python number, got {type(number).__name__}")
    if not 1e-6 <= how.temperature <= 1e6:
        raise ValueError(f"temperature must be between 1e-6 and 1e6, got {how.temperature}")
    if how.beta not in (0, 1) and not 1e-6 <= how.beta <= 1 - 1e-6:
        raise ValueError(f"beta must be 0, 1, or between 1e-6 and 1 - 1e-6, got {how.beta}")


def check_weight(
    name: str, weight: Optional[Tensor], letters: str, shape: Sequence[int], logits: Tensor
) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.is_complex():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
    if tuple(weight.shape) != tuple(shape):
        raise ValueError(f"{name} must be {letters}{list(shape)}, got {list(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(
            f"{name} must be on the logits' device {logits.device}, got {weight.device}"
        )


# --- Weights of rows, and means over the batch ----------------------------------------------------


class Weights(NamedTuple):
    """What every row of the batch counts, [B] in the dtype of the values, and whether it is read at
    all, [B] bool. Both None where all count 1."""

    weight: Optional[Tensor] = None
    kept: Optional[Tensor] = None


def row_weights(
    sample_weight: Optional[Tensor],
    dtype: torch.dtype,
    labels: Optional[Tensor] = None,
    ignore_index: int = -100,
) -> Weights:
    """Of rows [B] that count `sample_weight`, and 0 where their label is `ignore_index`.

    Raises:
        ValueError: a weight that is negative or not finite, where that can be known: not on a GPU,
            where reading it would wait for the device, nor while a graph is traced. There the row
            gets the weight NaN, and so does everything that depends on it.
    """
    if sample_weight is None and labels is None:
        return Weights()
    kept = None if labels is None else labels != ignore_index
    if sample_weight is None:
        assert kept is not None
        return Weights(kept.to(dtype), kept)
    weight = sample_weight.to(dtype)
    if sample_weight.dtype != torch.bool:
        sound = (weight >= 0) & (weight < math.inf)
        seen = known(sound.all())
        if seen is False:
            raise ValueError("sample_weight must be finite and not negative")
        if seen is None:
            weight = weight.masked_fill(~sound, math.nan)
    if kept is not None:
        weight = weight.masked_fill(~kept, 0)
    return Weights(weight, weight != 0)


def known(number: Tensor) -> Union[None, bool, float]:
    """The one number of a tensor, or None where asking would wait for a device or end a trace."""
    if number.device.type != "cpu" or compiling():
        return None
    try:
        return number.item()
    except RuntimeError:  # under vmap, or of a fake tensor
        return None


Normalizer = Optional[Union[float, Tensor]]


def shares(weights: Weights, normalizer: Normalizer, rows: Tensor) -> Tensor:
    """What each of some rows [..., B] counts in the mean over the batch, [B] or [1]."""
    weight = weights.weight
    if weight is None:
        weight = rows.new_ones(1, dtype=torch.promote_types(rows.dtype, torch.float32))
        if normalizer is None:
            return weight / rows.shape[-1]
    if normalizer is None:
        normalizer = weight.sum()
    if isinstance(normalizer, Tensor):
        # Of an empty mask the sum is 0, and the mean is to be 0 as well.
        normalizer = normalizer.to(weight).clamp(min=torch.finfo(weight.dtype).tiny)
    return weight / normalizer


def check_normalizer(normalizer: Normalizer, reduction: str) -> None:
    if normalizer is None:
        return
    if reduction == "none":
        raise ValueError("a normalizer divides the sum over the batch: not with reduction='none'")
    if isinstance(normalizer, Tensor):
        if normalizer.numel() != 1 or normalizer.is_complex():
            raise ValueError(f"normalizer must be one real number, got {list(normalizer.shape)}")
    elif isinstance(normalizer, bool) or not isinstance(normalizer, (int, float)):
        raise TypeError(f"normalizer must be a number, got {type(normalizer).__name__}")
    elif not 0 < normalizer < math.inf:
        raise ValueError(f"normalizer must be positive and finite, got {normalizer}")


def reduce_rows(
    rows: Tensor,
    reduction: str,
    edge_weight: Optional[Tensor],
    weights: Weights,
    normalizer: Normalizer = None,
) -> Tensor:
    """[E, B] nats, weighted; summed over B with their shares for "batchmean"."""
    if edge_weight is not None:
        rows = rows * edge_weight.to(rows.dtype)[:, None]
    if reduction == "none":
        return rows if weights.weight is None else rows * weights.weight
    if weights.weight is None and normalizer is None:
        return rows.mean(-1)
    return (rows * shares(weights, normalizer, rows)).sum(-1)


def reduce_fisher_rao(hellinger: Tensor, reduction: str, weights: Weights) -> Tensor:
    """[E, B] of |sqrt p - sqrt q|^2 -> radians: 4 asin(|sqrt p - sqrt q| / 2), [E, B] or [E]."""
    distance = 4 * torch.asin((hellinger.sqrt() / 2).clamp(max=math.sqrt(0.5)))
    if reduction == "none":
        return distance
    return reduce_rows(distance.square(), reduction, None, weights).sqrt()
