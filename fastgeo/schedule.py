"""How networks are trained; torch takes seconds to import, and these numbers need none of it."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Training:
    """How networks are trained, under a one-cycle rate.

    Attributes:
        epochs: passes over the training images or text (paper: 100)
        train_batch_size: images, or blocks of a text, of each network in a training step (paper:
            128)
        optimizer: sgd: with Nesterov momentum (paper); adamw, which transformers need: it has the
            momentum as its first beta, and 0.99 as its second
        train_lr: peak of the one-cycle rate (paper)
        weight_decay: L2 penalty (paper), or that of adamw
        warmup_fraction: share of the steps with rising rate, two steps at least (paper: pct_start)
        lr_start_divisor: peak rate over first rate (paper: div_factor)
        lr_end_divisor: first rate over last rate (paper: final_div_factor)
        momentum_low: momentum at the peak rate (paper)
        momentum_high: momentum at the first and last rate (paper)

    Raises:
        ValueError: a number that cannot be meant.
    """

    epochs: int = 20
    train_batch_size: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    train_lr: float = 0.1
    weight_decay: float = 1e-4
    warmup_fraction: float = 0.1
    lr_start_divisor: float = 1e9
    lr_end_divisor: float = 1e6
    momentum_low: float = 0.85
    momentum_high: float = 0.95

    def __post_init__(self) -> None:
        within(1, epochs=self.epochs, train_batch_size=self.train_batch_size)
        within(0, 1, weight_decay=self.weight_decay, warmup_fraction=self.warmup_fraction)
        within(0, 1, momentum_low=self.momentum_low, momentum_high=self.momentum_high)
        within(0, above=True, train_lr=self.train_lr)
        within(0, above=True, lr_start_divisor=self.lr_start_divisor)
        within(0, above=True, lr_end_divisor=self.lr_end_divisor)


def within(low: float, high: float = math.inf, *, above: bool = False, **values: float) -> None:
    """ValueError, naming the first value, unless low <= value <= high, and finite.

    Args:
        above: low < value.
    """
    for name, value in values.items():
        if not low <= value <= high or (above and value == low) or value == math.inf:
            bounds = f"above {low:g} and at most {high:g}" if above else f"within {low:g}..{high:g}"
            if high == math.inf:
                bounds = "positive" if above and not low else f"at least {low:g}"
            raise ValueError(f"{name} must be {bounds}, got {value}")
