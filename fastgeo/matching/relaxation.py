"""All permutations at once, relaxed: the Frank-Wolfe ascent of weight matching.

Coordinate descent decides one family of permutations by how the others stand. Here all of them are
mixtures of permutations (doubly stochastic matrices) that move together: each step goes from where
they are towards the permutations that the gradient of the inner product prefers, as far as that
gains the most, and they become permutations only in the end. D. Crisostomi et al., "C2M3:
Cycle-Consistent Multi-Model Merging" (2024), for two networks, and here for permutations within
others.

A weight with two permuted axes makes the inner product quadratic, and its gradient linear: on the
way to other permutations the gradient changes to theirs in a straight line, and is never computed
of mixtures.
"""

import math

import torch
from torch import Tensor

from fastgeo.matching.assignment import Assignment, inner, leaves
from fastgeo.symmetry.spec import Permutations

GAIN = 1e-6  # relative gain of a step, below which it is the last
Matrices = dict[str, Tensor]  # permutation -> [new, old], counted through what it is within


class Relaxation:
    """The inner product of an assignment's networks for mixtures of permutations, in fp32.

    Weights with three permuted axes are left out, and those with two permutations within the same
    third one, as of grouped convolutions: mixtures of the two would mix the groups twice.
    """

    def __init__(self, assignment: Assignment):
        self.assignment = assignment
        self.sizes = {name: own.numel() for name, own in assignment.permutations.items()}
        self.leaves: dict[int, list[tuple[int, str]]] = {}
        for i, block in enumerate(assignment.blocks):
            axes = leaves(block, self.sizes)
            outer = [place for axis, _ in axes for place in block.within[axis]]
            if len(axes) <= 2 and len(outer) == len(set(outer)):
                self.leaves[i] = axes

    def ascend(self, max_steps: int, most_work: float = math.inf) -> None:
        """Permute the assignment's b from where it stands.

        Args:
            max_steps: limit on them.
            most_work: no step is begun that would be more in all; what is left out is noted in the
                assignment.
        """
        before, start = self.assignment.work, self.assignment.permutations
        here = {name: self._matrix(name, start) for name in self.sizes}
        value, gradient = self.value(start), self.gradient(start)
        a_step = self.assignment.work - before
        for step in range(max_steps):
            if self.assignment.work + a_step > most_work:
                self.assignment.left_out.append(f"the relaxation from step {step + 1} on")
                break
            best = self._best(gradient)
            places = {name: self._places(name, best) for name in here}
            slope = sum(
                gradient[name][places[name]].sum(dtype=torch.float64).item()
                - inner(gradient[name], here[name])
                for name in here
            )
            square = self.value(best) - value - slope
            share = min(1.0, -slope / (2 * square)) if square < 0 else 1.0
            gain = slope * share + square * share**2
            if gain < GAIN * abs(value):
                break
            for name in here:
                here[name].mul_(1 - share)
                here[name][places[name]] += share
                gradient[name].mul_(1 - share)
            self._add(best, share, gradient)
            value += gain
        shaped = {name: self.assignment.shaped(name, own) for name, own in here.items()}
        self.assignment.assign(shaped)

    def value(self, permutations: Permutations) -> float:
        """The inner product for permutations."""
        assignment = self.assignment
        return sum(inner(assignment.a[i], assignment.part(i, permutations)) for i in self.leaves)

    def gradient(self, permutations: Permutations) -> Matrices:
        """Of the inner product by each entry of the matrices."""
        gradient = {name: self._zeros(name) for name in self.sizes}
        self._add(permutations, 1.0, gradient)
        return gradient

    def _add(self, permutations: Permutations, share: float, to: Matrices) -> None:
        for i, own in self.leaves.items():
            for axis, name in own:
                gain = self.assignment.gain_of(i, axis, name, permutations, torch.float32)
                to[name].add_(gain, alpha=share)

    def _best(self, gradient: Matrices) -> Permutations:
        """The permutations that the gradient prefers."""
        shaped = {n: self.assignment.shaped(n, own).cpu().numpy() for n, own in gradient.items()}
        best: Permutations = {}
        for family in self.assignment.families:
            best |= self.assignment.solve(family, shaped)[0]
        return best

    def _places(self, name: str, permutations: Permutations) -> tuple[Tensor, Tensor]:
        """Where the matrix of a permutation has ones."""
        return torch.arange(self.sizes[name]), self.assignment.positions(name, permutations)

    def _matrix(self, name: str, permutations: Permutations) -> Tensor:
        matrix = self._zeros(name)
        matrix[self._places(name, permutations)] = 1
        return matrix

    def _zeros(self, name: str) -> Tensor:
        size = self.sizes[name]
        return torch.zeros(size, size, device=self.assignment.b[0].device)
