"""Assignment of one network's channels to another's, a family of permutations at a time.

A family is a permutation and all those within it: the heads, and the channels within each head.
With every other family held fixed, the inner product of two networks is linear in the permutations
of a family, and the best ones come from linear assignment problems: for every pair of heads the
best permutations within them, then the best permutation of heads given what each pair is worth.
Where a parameter has a family on two of its axes the inner product is quadratic: the same step is
taken from where it stands, and kept if it gains.
"""

import itertools
from collections.abc import Container, Iterable, Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastgeo.symmetry.spec import Block, Permutations, PermutationSpec

ROUNDING = 1e-12  # of the largest gain of a pair of positions: less is no improvement
Pair = tuple[Block, Tensor, Tensor]  # a block, and that part of a and of b


class Assignment:
    """Permutations of b, which are improved a family at a time.

    Attributes:
        families: the name of the outermost permutation of each.
        of: family -> the numbers of its blocks.
        blocks, a, b: each block, and that part of a and of the permuted b.
        permutations: of b so far.
    """

    def __init__(self, spec: PermutationSpec, pairs: Iterable[Pair]):
        self.spec, self.blocks, self.a, self.b = spec, [], [], []
        for block, a, b in pairs:
            self.blocks.append(block)
            self.a.append(a)
            self.b.append(b)
        self._within: dict[tuple[str, ...], list[str]] = {}
        for name, own in spec.channels.items():
            self._within.setdefault(own.within, []).append(name)
        self.families = sorted(self._within.get((), []))
        self._members = {root: {root, *self._inside((root,))} for root in self.families}
        self.of = {
            root: [i for i, block in enumerate(self.blocks) if members & set(block.axes)]
            for root, members in self._members.items()
        }
        self._leaves = {
            root: [(i, *leaf) for i in own for leaf in leaves(self.blocks[i], self._members[root])]
            for root, own in self.of.items()
        }
        self._linear = {
            root: len(leaves) == len(self.of[root]) for root, leaves in self._leaves.items()
        }
        self.permutations = spec.identity()

    def _inside(self, within: tuple[str, ...]) -> Iterable[str]:
        for name in self._within.get(within, []):
            yield name
            yield from self._inside((*within, name))

    def neighbours(self, root: str) -> set[str]:
        """The families whose gains depend on a family's permutations."""
        names = {name for i in self.of[root] for name in self.blocks[i].axes}
        found = {other for other in self.families if names & self._members[other]}
        return found - {root} if self._linear[root] else found

    def apply(self, permutations: Mapping[str, Tensor]) -> None:
        """Permute b as it is now further."""
        for i, block in enumerate(self.blocks):
            if not permutations.keys().isdisjoint(block.axes):
                self.b[i] = block.permuted(self.b[i], permutations)
        for name, own in self.spec.channels.items():
            block = _index_block(name, own.within, self.permutations[name].shape)
            self.permutations[name] = block.permuted(self.permutations[name], permutations)

    def positions(self, name: str, permutations: Mapping[str, Tensor]) -> Tensor:
        """The old position, counted through what it is within, at each new one of a permutation."""
        own = self.permutations[name]
        block = _index_block(name, self.spec.channels[name].within, own.shape)
        return block.permuted(torch.arange(own.numel()).view(own.shape), permutations)

    def improve(self, root: str) -> bool:
        """Give a family its best permutations while all others stay; whether that gained any."""
        gains = self.gains(root)
        best, gained = self.solve(root, gains)
        scale = max(abs(gain).max() for gain in gains.values())
        if not gained > ROUNDING * scale:
            return False
        if self._linear[root]:
            self.apply(best)
            return True
        before = self._worth(root), list(self.b), dict(self.permutations)
        self.apply(best)
        if self._worth(root) > before[0] + ROUNDING * scale:
            return True
        _, self.b, self.permutations = before
        return False

    def assign(self, gains: Mapping[str, Tensor]) -> None:
        """Give every family the best permutations for such gains, as `gains` has them, and one that
        they say nothing of the best by its weights."""
        arrays = {name: gain.cpu().numpy() for name, gain in gains.items()}
        shown = [root for root in self.families if not self._members[root].isdisjoint(gains)]
        for root in shown:
            self.apply(self.solve(root, arrays)[0])
        for root in self.families:
            if root not in shown:
                self.improve(root)

    def assign_inwards(self) -> None:
        """Assign every family once, by the weights whose other axes are fixed or assigned already.

        Where the other axes are in any order, a weight tells nothing of this one.
        """
        known: set[str | None] = {None}
        waiting = list(self.families)
        while waiting:
            shares = {root: self._known(root, known) for root in waiting}
            root = max(waiting, key=shares.__getitem__)
            waiting.remove(root)
            known |= self._members[root]
            if shares[root]:
                self.apply(self.solve(root, self.gains(root, known))[0])

    def _known(self, root: str, known: set[str | None]) -> float:
        """The share of a family's weights of which all other permutations are known."""
        known = known | self._members[root]
        own = [(self.a[i].numel(), known.issuperset(self.blocks[i].axes)) for i in self.of[root]]
        return sum(size for size, is_known in own if is_known) / sum(size for size, _ in own)

    def gains(self, root: str, known: set[str | None] | None = None) -> dict[str, np.ndarray]:
        """For each permutation of a family what it is worth to put an old position at a new one:
        [sizes of what it is within, size] of the new position, and the same of the old one; by the
        blocks whose permutations are all known, if those are given."""
        gains: dict[str, Tensor] = {}
        for i, axis, name in self._leaves[root]:
            block = self.blocks[i]
            if known is not None and not known.issuperset(block.axes):
                continue
            places = (*block.within[axis], axis)
            sizes = [block.sizes[place] for place in places]
            a, b = (
                t[i].movedim(places, tuple(range(len(places)))).flatten(0, len(places) - 1)
                for t in (self.a, self.b)
            )
            gain = a.flatten(1) @ b.flatten(1).T if a.ndim > 1 else torch.outer(a, b)
            gain = gain.view(*sizes, *sizes)
            gains[name] = gains[name] + gain if name in gains else gain
        return {name: gain.cpu().numpy() for name, gain in gains.items()}

    def solve(self, root: str, gains: Mapping[str, np.ndarray]) -> tuple[Permutations, float]:
        """The best permutations of a family for such gains, and by how much they are better than
        none."""
        found = {
            name: torch.empty(self.permutations[name].shape, dtype=torch.int64)
            for name in self._members[root]
        }
        worth, best = self._solve(root, gains, (), ())
        _write(best, found, ())
        return found, worth - self._now(root, gains, ())

    def _solve(self, name: str, gains: Mapping, new: tuple, old: tuple) -> tuple[float, tuple]:
        """What the best permutation is worth at these positions of what it is within, and it with
        all those within it: (name, assignment, for each position the same of what is within)."""
        size, inner = self.spec.channels[name].size, self._children(name)
        gain = gains[name][(*new, slice(None), *old)] if name in gains else np.zeros((size, size))
        below = {}
        if inner:
            gain = gain.copy()
            for i, j in itertools.product(range(size), repeat=2):
                solved = [self._solve(child, gains, (*new, i), (*old, j)) for child in inner]
                gain[i, j] += sum(worth for worth, _ in solved)
                below[i, j] = [best for _, best in solved]
        rows, best = linear_sum_assignment(gain, maximize=True)
        inside = [below[i, j] for i, j in enumerate(best)] if inner else []
        return gain[rows, best].sum(), (name, best, inside)

    def _now(self, name: str, gains: Mapping, at: tuple) -> float:
        """What it is worth to leave everything where it is."""
        size, inner = self.spec.channels[name].size, self._children(name)
        worth = np.trace(gains[name][(*at, slice(None), *at)]) if name in gains else 0.0
        for child in inner:
            worth += sum(self._now(child, gains, (*at, i)) for i in range(size))
        return worth

    def _children(self, name: str) -> list[str]:
        return self._within.get((*self.spec.channels[name].within, name), [])

    def _worth(self, root: str) -> float:
        return sum((self.a[i] * self.b[i]).sum().item() for i in self.of[root])


def _write(best: tuple, found: Permutations, at: tuple[int, ...]) -> None:
    name, assignment, inside = best
    found[name][at] = torch.from_numpy(assignment)
    for i, children in enumerate(inside):
        for child in children:
            _write(child, found, (*at, i))


def leaves(block: Block, members: Container[str]) -> list[tuple[int, str]]:
    """The axes of a block with a family's permutations that no other of them is within, and the
    permutation of each."""
    own = [
        (axis, name) for axis, name in enumerate(block.axes) if name is not None and name in members
    ]
    outer = {place for axis, _ in own for place in block.within[axis]}
    return [(axis, name) for axis, name in own if axis not in outer]


def _index_block(name: str, within: tuple[str, ...], shape: torch.Size) -> Block:
    """A permutation as a block: what it holds moves with what it is a permutation of."""
    nested = tuple(tuple(range(i)) for i in range(len(shape)))
    return Block(name, 0, tuple(shape), (), (*within, name), nested)
