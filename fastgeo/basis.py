"""The functions of t in [0, 1] that make a curve of control points: theta(t) = B(t) @ controls."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["polychain", "bezier"]
COARSEST = {"polychain": 5, "bezier": 3}  # control points to begin with, coarse to fine


@dataclass(frozen=True)
class Basis:
    """K functions that sum up to 1; the first and the last one belong to the fixed ends.

    Attributes:
        kind: "polychain", straight lines between control points at even t, whose functions are
            hats; or "bezier", whose functions are Bernstein's polynomials of degree K - 1.
        size: K, control points with both ends.
    """

    kind: Kind
    size: int

    def weights(self, t: Tensor) -> Tensor:
        """[T, K] float64, B at each of t [T]."""
        t = t.double()[:, None]
        k = torch.arange(self.size, dtype=torch.float64)
        if self.kind == "polychain":
            return (1 - (t * (self.size - 1) - k).abs()).clamp(min=0)
        return _binomials(self.size - 1) * t**k * (1 - t) ** (self.size - 1 - k)

    def stiffness(self) -> Tensor:
        """[K - 2, K - 2] float64, the integral of B_j' B_k' of the functions between the ends.

        For hats that is K - 1 times the path Laplacian tridiag(-1, 2, -1).
        """
        degree = self.size - 1
        differences = torch.eye(self.size, dtype=torch.float64).diff(dim=0)  # [K - 1, K]
        if self.kind == "polychain":
            integrals = degree * torch.eye(degree, dtype=torch.float64)
        else:  # of products of Bernstein's polynomials of degree K - 2
            one, twice = _binomials(degree - 1), _binomials(2 * degree - 2)
            k = torch.arange(degree)
            integrals = one * one[:, None] / twice[k + k[:, None]] * degree**2 / (2 * degree - 1)
        return (differences.T @ integrals @ differences)[1:-1, 1:-1]

    def refinement(self, size: int) -> Tensor:
        """[size, K] float64, the control points of the same curve in another number.

        They make the curve that meets this one at as many even t: this one itself where there are
        more of them, of hats between those there are.
        """
        t = torch.arange(size, dtype=torch.float64) / (size - 1)
        return torch.linalg.solve(replace(self, size=size).weights(t), self.weights(t))

    def levels(self) -> list[int]:
        """Numbers of control points from few to K, each of which refines the one before: midpoints
        are inserted, the last time up to K of them, or the degree rises by one."""
        sizes = [COARSEST[self.kind]]
        while sizes[-1] < self.size:
            sizes.append(2 * sizes[-1] - 1 if self.kind == "polychain" else sizes[-1] + 1)
        return [*sizes[:-1], self.size]


def _binomials(n: int) -> Tensor:
    return torch.tensor([math.comb(n, k) for k in range(n + 1)], dtype=torch.float64)
