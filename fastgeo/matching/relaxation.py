"""All permutations at once, relaxed: the Frank-Wolfe ascent of weight matching.

Coordinate descent decides one family of permutations by how the others stand. Here all of them are
mixtures of permutations (doubly stochastic matrices) that move together: each step goes from where
they are towards the permutations that the gradient of the inner product prefers, as far as that
gains the most, and they become permutations only in the end. D. Crisostomi et al., "C2M3: Cycle-
Consistent Multi-Model Merging" (2024), for two networks, and here for permutations within others.
"""

from math import prod

import torch
from torch import Tensor

from fastgeo.matching.assignment import Assignment, leaves
from fastgeo.symmetry.spec import Block, Permutations

GAIN = 1e-6  # relative gain of a step, below which it is the last
Mixtures = dict[str, Tensor]  # permutation -> [new, old], counted through what it is within


class Relaxation:
    """The inner product of an assignment's networks for mixtures of permutations, in fp32.

    Weights with two permutations within the same third one, as of grouped convolutions, are left
    out: mixtures of the two would mix the groups twice.
    """

    def __init__(self, assignment: Assignment):
        self.assignment = assignment
        self.sizes = {name: own.numel() for name, own in assignment.permutations.items()}
        self.blocks: list[Block] = []
        self.leaves: list[list[tuple[int, str]]] = []
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []
        for block, a, b in zip(assignment.blocks, assignment.a, assignment.b, strict=True):
            axes = leaves(block, self.sizes)
            outer = [place for axis, _ in axes for place in block.within[axis]]
            if len(outer) == len(set(outer)):
                self.blocks.append(block)
                self.leaves.append(axes)
                self.a.append(a.float())
                self.b.append(b.float())

    def ascend(self, max_steps: int) -> None:
        """Permute the assignment's b from where it stands."""
        device = self.b[0].device if self.b else None
        here = {name: torch.eye(size, device=device) for name, size in self.sizes.items()}
        value = self.value(here)
        for _ in range(max_steps):
            gradient = self._gradient(here)
            there = self._vertex(gradient)
            step = {name: there[name] - here[name] for name in here}
            slope = sum((gradient[name] * step[name]).sum().item() for name in here)
            whole = self.value(there)
            # Nearly every parameter has two permuted axes at most: the value is quadratic.
            square = whole - value - slope
            best = min(1.0, -slope / (2 * square)) if square < 0 else 1.0
            gain = slope * best + square * best**2
            if gain < GAIN * abs(value):
                break
            here = {name: here[name] + best * step[name] for name in here}
            value += gain
        self.assignment.assign({name: self._shaped(name, own) for name, own in here.items()})

    def value(self, mixtures: Mixtures) -> float:
        return sum((a * self._mixed(i, mixtures)).sum().item() for i, a in enumerate(self.a))

    def _gradient(self, mixtures: Mixtures) -> dict[str, Tensor]:
        gradient = {name: torch.zeros_like(own) for name, own in mixtures.items()}
        for i, block in enumerate(self.blocks):
            for axis, name in self.leaves[i]:
                b = self._mixed(i, mixtures, but=axis)
                a, b = (_rows(block, axis, t) for t in (self.a[i], b))
                gradient[name] += a @ b.T
        return gradient

    def _vertex(self, gradient: dict[str, Tensor]) -> Mixtures:
        """The permutations that the gradient prefers, as matrices."""
        shaped = {name: self._shaped(name, own).cpu().numpy() for name, own in gradient.items()}
        best: Permutations = {}
        for family in self.assignment.families:
            best |= self.assignment.solve(family, shaped)[0]
        matrices = {}
        for name, size in self.sizes.items():
            old = self.assignment.positions(name, best).flatten()
            matrices[name] = torch.zeros_like(gradient[name])
            matrices[name][torch.arange(size), old] = 1
        return matrices

    def _mixed(self, i: int, mixtures: Mixtures, but: int | None = None) -> Tensor:
        """A block of b under the mixtures of all its axes but one."""
        block, b = self.blocks[i], self.b[i]
        for axis, name in self.leaves[i]:
            if axis != but:
                places = (*block.within[axis], axis)
                first = tuple(range(len(places)))
                rows = _rows(block, axis, b)
                shape = b.movedim(places, first).shape
                b = (mixtures[name] @ rows).view(shape).movedim(first, places)
        return b

    def _shaped(self, name: str, matrix: Tensor) -> Tensor:
        return matrix.view(*self.assignment.permutations[name].shape * 2)


def _rows(block: Block, axis: int, part: Tensor) -> Tensor:
    """[positions on an axis and on those it is within, all others]."""
    places = (*block.within[axis], axis)
    rows = prod(block.sizes[place] for place in places)
    return part.movedim(places, tuple(range(len(places)))).reshape(rows, -1)
