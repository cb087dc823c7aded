"""How a path descends: what is lowered, at which rate, preconditioned, from how many points."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # a command that prints its help needs no torch
    from fastgeo.basis import Basis
    from fastgeo.path import Path

SCHEDULES = {  # factor on the rate at a share of the steps
    "constant": lambda share: 1.0,
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
}


@dataclass(frozen=True)
class Descent:
    """How the energy of a path is descended: SGD, in the inner product of paths.

    Without momentum, at a constant rate and from all points, each step is equivalent to::

        p = [functional_call(module, point, inputs).softmax(-1) for point in path.points()]
        energy = sum(js_div(p[i], p[i + 1]) for i in range(N - 1))
        gradient = torch.autograd.grad(energy, interior)         # [N - 2, ...] each
        interior -= lr * inverse_path_laplacian(N - 2) @ gradient

    `Descent(momentum=0, lr_schedule="constant", precondition=False, coarse_to_fine=False)` is the
    SGD of Tan et al. `Descent(objective="cross_entropy", nodes=1)` on a `Path.bezier` is the curve
    finding of Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs"
    (2018), but for the preconditioner.

    Attributes:
        lr: learning rate of the first step.
        momentum: Nesterov momentum on the preconditioned gradient; 0 for none (paper). Steps grow
            to 1 / (1 - momentum) times their length, so use a lower rate with it.
        lr_schedule: "constant" (paper), or the rate falls to 0 after the last step, "linear" in
            the step or along half a "cosine" wave.
        precondition: multiply the gradient by the inverse path Laplacian; no: the gradient itself
            (paper).
        coarse_to_fine: begin with 5 points along the path and insert midpoints on the way, or with
            one control point of a Bezier curve and raise its degree; no: all of them from the start
            (paper). For a straight line: of any other path, what lies between those points is lost.
        objective: "jsd", the divergences of neighbours, which needs no labels (paper); or
            "cross_entropy", the mean loss on labelled batches along the path.
        nodes: how many networks between the ends a step evaluates, at t that are drawn anew in
            every step, one in each of as many equal parts of the path; None: the path's own points
            (paper).

    Raises:
        ValueError: lr <= 0, momentum outside [0, 1), nodes < 1, an unknown schedule or objective.
    """

    lr: float = 0.1
    momentum: float = 0.9
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    precondition: bool = True
    coarse_to_fine: bool = True
    objective: Literal["jsd", "cross_entropy"] = "jsd"
    nodes: int | None = None

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be within 0..1, and less than 1, got {self.momentum}")
        if self.lr_schedule not in SCHEDULES:
            names = ", ".join(SCHEDULES)
            raise ValueError(f"lr_schedule must be one of {names}: {self.lr_schedule!r}")
        if self.objective not in ("jsd", "cross_entropy"):
            raise ValueError(f"objective must be 'jsd' or 'cross_entropy', got {self.objective!r}")
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"nodes must be at least 1, got {self.nodes}")

    @property
    def needs_steps(self) -> bool:
        """Whether it depends on how many steps there are."""
        return self.lr_schedule != "constant" or self.coarse_to_fine

    def rate(self, step: int, steps: int | None) -> float:
        """The learning rate of a step of so many; 0 after the last one."""
        share = min(step / steps, 1.0) if steps else 0.0
        return self.lr * SCHEDULES[self.lr_schedule](share)

    def at_control_points(self, path: "Path") -> bool:
        """Whether the networks of a step are the control points, with every edge alike."""
        return path.free and self.nodes is None and self.objective == "jsd"

    def levels(self, basis: "Basis", steps: int | None) -> dict[int, int]:
        """First step -> how many control points from it on, as in {0: 5, 40: 9, 70: 17, 90: 25}.

        The long waves of a path, which take the most steps, can be had on few points, where a step
        costs little; the points in between then start near to where they end. The k levels have k,
        ..., 2, 1 parts of the steps; so, of 25 points, the whole is 0.37 times the work of that
        many steps on all points.

        Args:
            basis: of the path at the end.
            steps: of all levels together; with fewer than levels, the coarsest ones are left out.
        """
        if not self.coarse_to_fine or steps is None:
            return {0: basis.size}
        sizes = basis.levels()[-steps:]
        parts = len(sizes) * (len(sizes) + 1) // 2
        found, first = {}, 0
        for i, size in enumerate(sizes):
            found[first] = size
            left = len(sizes) - 1 - i  # levels behind this one, which have a step each at least
            share = max(1, round(steps * (left + 1) / parts))
            first = min(first + share, steps - left)
        return found
