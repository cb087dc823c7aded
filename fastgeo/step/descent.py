"""One step of gradient descent on a path: preconditioner, momentum and learning rate."""

import math

import torch
from fastgeo_kernels import inverse_path_laplacian
from torch import Tensor

from fastgeo.path import Path

SCHEDULES = {  # factor on the rate at a share of the steps
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


class Descent:
    """SGD on the interior of a path.

    Args:
        trained: name of every parameter to train -> the first name of it (tied ones have several).
        lr: rate of the first step.
        momentum: of Nesterov, on the preconditioned gradient.
        lr_schedule: a key of `SCHEDULES`.
        precondition: multiply the gradient by the inverse path Laplacian.
        steps: of the whole optimisation; None if the rate is constant.

    Attributes:
        velocity: first name -> [N - 2, ...]; empty without momentum, and before the first step.
    """

    def __init__(
        self,
        trained: dict[str, str],
        *,
        lr: float,
        momentum: float,
        lr_schedule: str,
        precondition: bool,
        steps: int | None,
    ):
        if not lr > 0:
            raise ValueError(f"lr must be positive, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be within 0..1, and less than 1, got {momentum}")
        if lr_schedule not in SCHEDULES:
            raise ValueError(f"lr_schedule must be one of {', '.join(SCHEDULES)}: {lr_schedule!r}")
        if lr_schedule != "constant" and steps is None:
            raise ValueError(f"lr_schedule {lr_schedule!r} needs the number of steps")
        self.trained, self.lr, self.momentum, self.steps = trained, lr, momentum, steps
        self.factor, self.precondition = SCHEDULES[lr_schedule], precondition
        self.velocity: dict[str, Tensor] = {}
        self._inverse: Tensor | None = None

    def rate(self, step: int) -> float:
        """The learning rate of a step; 0 from behind the last one on."""
        return self.lr * self.factor(min(step / self.steps, 1.0) if self.steps else 0.0)

    def update(self, path: Path, gradient: dict[str, Tensor], step: int) -> Path:
        """The path after a step; tied parameters stay tied.

        Args:
            gradient: first name -> [N - 2, ...].
        """
        rate, moved = self.rate(step), {}
        for name, grad in gradient.items():
            direction = self._preconditioned(grad) if self.precondition else grad
            if self.momentum:
                before = self.velocity.get(name)
                after = direction if before is None else before.mul(self.momentum).add_(direction)
                self.velocity[name] = after
                direction = direction + self.momentum * after
            moved[name] = path.interior[name] - rate * direction
        tied = {name: moved[first] for name, first in self.trained.items()}
        return Path(path.start, path.interior | tied, path.end)

    def _preconditioned(self, grad: Tensor) -> Tensor:
        if self._inverse is None or len(self._inverse) != len(grad):
            self._inverse = inverse_path_laplacian(len(grad)).to(grad.device)
        precision = torch.promote_types(grad.dtype, self._inverse.dtype)  # at least fp32
        rows = grad.reshape(len(grad), -1).to(precision)
        return (self._inverse.to(precision) @ rows).view_as(grad).to(grad)


def resampled(velocity: dict[str, Tensor], points: int) -> dict[str, Tensor]:
    """The velocity [N - 2, ...] of a path with another N: a curve, too, which is 0 at the ends."""
    if not velocity:
        return {}
    zero = {name: torch.zeros_like(tensor[0]) for name, tensor in velocity.items()}
    return Path(zero, velocity, zero).resample(points).interior
