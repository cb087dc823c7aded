"""Where on a curve a step evaluates networks, and what their gradients are to its control points.

An objective is an integral over t. Of the Jensen-Shannon divergences D_e of neighbours it is the
sum of D_e / Δt_e, which tends to an eighth of the integral of the squared speed under the Fisher
metric; of the cross-entropy it is the mean of the networks' own. A gradient G [T, ...] to the
networks at t is BᵀG to the control points, and S⁻¹BᵀG in the inner product of curves, the integral
of products of their derivatives, S_jk = ∫ B_j' B_k' dt.

Control points that are N even points have B = 1 and S = (N - 1) L, L the path Laplacian, and the
factor N - 1 of the divergences is that of S: the step L⁻¹ ∇ Σ D_e, which needs neither, is this
one, so a learning rate means the same for every curve.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgeo.path import Path
from fastgeo.step.descent import Descent


class Grid(NamedTuple):
    """T networks between the ends of a curve of K control points.

    Attributes:
        weights: [T, K], of the control points in each network.
        counts: what each term of the objective counts, [T + 1] of divergences, [T] of
            cross-entropies.
        back: [K - 2, T], from the gradient to the networks to the step of the control points.
    """

    weights: Tensor
    counts: Tensor
    back: Tensor


class Nodes:
    """The grids of the steps on one curve.

    Args:
        generator: draws those that are random.

    Attributes:
        count: T.
        terms: how many the objective has.
    """

    def __init__(self, path: Path, descent: Descent, generator: torch.Generator):
        self._descent, self._basis, self._generator = descent, path.basis, generator
        dtype = next(iter(path.interior.values())).dtype
        self._of: dict[str, Any] = dict(
            device=path.device, dtype=torch.promote_types(dtype, torch.float32)
        )
        self.count = descent.nodes or len(path) - 2
        self.terms = self.count + (descent.objective == "jsd")
        stiffness = self._basis.stiffness()
        if descent.precondition:
            self._inverse = torch.linalg.inv(stiffness)
        else:
            self._inverse = torch.eye(len(stiffness)).to(stiffness)
        even = torch.arange(1, len(path) - 1, dtype=torch.float64) / (len(path) - 1)
        self._even = None if descent.at_control_points(path) else self._grid(even)

    def draw(self) -> Grid | None:
        """Of the next step; None where the networks are the control points, and all count 1."""
        nodes = self._descent.nodes
        if nodes is None:
            return self._even
        drawn = torch.rand(nodes, dtype=torch.float64, generator=self._generator)
        return self._grid((torch.arange(nodes) + drawn) / nodes)

    def _grid(self, t: Tensor) -> Grid:
        weights = self._basis.weights(t)
        counts = torch.full_like(t, 1 / len(t))
        if self._descent.objective == "jsd":
            counts = 1 / torch.cat([t.new_zeros(1), t, t.new_ones(1)]).diff()
        grid = weights, counts, self._inverse @ weights[:, 1:-1].T
        return Grid(*(tensor.to(**self._of) for tensor in grid))
