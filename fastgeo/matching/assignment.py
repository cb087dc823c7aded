"""Assignment of one network's channels to another's, a family of permutations at a time.

A family is a permutation and all those within it: the heads, and the channels within each head.
With every other family held fixed, the inner product of two networks is linear in the permutations
of a family, and the best ones come from linear assignment problems: for every pair of heads the
best permutations within them, then the best permutation of heads given what each pair is worth.
Where a parameter has a family on two of its axes the inner product is quadratic: the same step is
taken from where it stands, and kept if it gains.

Channels that may be mixed (`PermutationSpec.mixed`) have orthogonal matrices in the place of
permutations: the best one is that of the orthogonal Procrustes problem, and a pair of heads is
worth the sum of singular values (P. H. Schönemann, "A generalized solution of the orthogonal
Procrustes problem", Psychometrika, 1966).

No weight is copied: b is permuted a block at a time where that is asked for, and what pairs of
positions are worth is kept until a permutation moves that it depends on.
"""

import itertools
import math
from collections.abc import Container, Iterable, Mapping

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fastgeo.symmetry.spec import Block, Permutations, PermutationSpec, nearest_orthogonal

PART = 2**21  # numbers of a and of b that are float64 at a time
PROCRUSTES = 40  # FLOP of an orthogonal Procrustes problem of n positions, over n^3
ASSIGNMENT = 4  # FLOP of a product take as long as the assignment of n positions, over n^3
ROUNDING = 1e-12  # of the largest gain of a pair of positions: less is no improvement
Pair = tuple[Block, Tensor, Tensor]  # a block, and that part of a and of b


class Assignment:
    """Permutations of b, which are improved a family at a time.

    Attributes:
        families: the name of the outermost permutation of each.
        of: family -> the numbers of its blocks.
        blocks, a, b: each block, and that part of a and of b, which is not permuted.
        permutations: of b so far.
        work: FLOP of the products done so far, those in fp32 counted half, and what assignments
            are counted as.
        most_work: who sees that more is done begins nothing else,
        left_out: and says here what that is.
    """

    def __init__(self, spec: PermutationSpec, pairs: Iterable[Pair], most_work: float = math.inf):
        self.spec, self.work, self.most_work = spec, 0.0, most_work
        self.left_out: list[str] = []
        self.blocks: list[Block] = []
        self.a: list[Tensor] = []
        self.b: list[Tensor] = []
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
        self._kept: dict[tuple[int, int], tuple[Permutations, Tensor] | None] = dict.fromkeys(
            self._worth_keeping()
        )

    def _worth_keeping(self) -> Iterable[tuple[int, int]]:
        """Blocks and axes whose gains are kept, those first that take the most products for their
        size, in as much memory as b has."""
        rows = {
            (i, axis): math.prod(self._shape(name))
            for own in self._leaves.values()
            for i, axis, name in own
        }
        space = sum(b.nbytes for b in self.b)
        for i, axis in sorted(rows, key=lambda one: rows[one] / self.b[one[0]].numel()):
            space -= 8 * rows[i, axis] ** 2
            if space > 0 and self.b[i].numel() > rows[i, axis]:
                yield i, axis

    def _inside(self, within: tuple[str, ...]) -> Iterable[str]:
        for name in self._within.get(within, []):
            yield name
            yield from self._inside((*within, name))

    def neighbours(self, root: str) -> set[str]:
        """The families whose gains depend on a family's permutations."""
        names = {name for i in self.of[root] for name in self.blocks[i].axes}
        found = {other for other in self.families if names & self._members[other]}
        return found - {root} if self._linear[root] else found

    def part(self, i: int, permutations: Permutations | None = None) -> Tensor:
        """A block of b, permuted as it is now or in another way."""
        return self.blocks[i].permuted(self.b[i], permutations or self.permutations)

    def parts(self) -> list[Tensor]:
        """All blocks of b, permuted as they are now."""
        return [self.part(i) for i in range(len(self.blocks))]

    def move(self, permutations: Permutations) -> None:
        """Put some permutations in the place of those that are."""
        self.permutations = self.permutations | permutations

    def against(self, i: int, a: Tensor) -> None:
        """Put another part in the place of a's in a block."""
        self.a[i] = a
        for block, axis in self._kept:
            if block == i:
                self._kept[block, axis] = None

    def positions(self, name: str, permutations: Permutations) -> Tensor:
        """The old position at each new one of a permutation, both counted through what it is
        within: [sizes of that x size]; of a permutation of what is mixed only the latter."""
        shape = self._shape(name)
        if name in self.spec.mixed:
            permutations = {n: p for n, p in permutations.items() if n != name}
        nested = tuple(tuple(range(i)) for i in range(len(shape)))
        axes = (*self.spec.channels[name].within, name)
        block = Block(name, 0, tuple(shape), (), axes, nested)
        return block.permuted(torch.arange(math.prod(shape)).view(shape), permutations).flatten()

    def improve(self, root: str) -> bool:
        """Give a family its best permutations while all others stay; whether that gained any."""
        gains = self.gains(root)
        best, gained = self.solve(root, gains)
        scale = max(abs(gain).max() for gain in gains.values())
        if not gained > ROUNDING * scale:
            return False
        if self._linear[root]:
            self.move(best)
            return True
        before = self._worth(root), self.permutations
        self.move(best)
        if self._worth(root) > before[0] + ROUNDING * scale:
            return True
        self.permutations = before[1]
        return False

    def assign(self, gains: Mapping[str, Tensor]) -> None:
        """Give every family the best permutations for such gains, as `gains` has them, and one that
        they say nothing of the best by its weights."""
        arrays = {name: gain.cpu().numpy() for name, gain in gains.items()}
        shown = [root for root in self.families if not self._members[root].isdisjoint(gains)]
        for root in shown:
            self.move(self.solve(root, arrays)[0])
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
                self.move(self.solve(root, self.gains(root, known))[0])

    def _known(self, root: str, known: set[str | None]) -> float:
        """The share of a family's weights of which all other permutations are known."""
        known = known | self._members[root]
        own = [(self.a[i].numel(), known.issuperset(self.blocks[i].axes)) for i in self.of[root]]
        return sum(size for size, is_known in own if is_known) / sum(size for size, _ in own)

    def gains(self, root: str, known: set[str | None] | None = None) -> dict[str, np.ndarray]:
        """For each permutation of a family what it is worth to put an old position at a new one:
        [sizes of what it is within, size] of the new position, and the same of the old one; by the
        blocks whose permutations are all known, if those are given."""
        gains: dict[str, np.ndarray] = {}
        for i, axis, name in self._leaves[root]:
            if known is None or known.issuperset(self.blocks[i].axes):
                gain = self.shaped(name, self._gain(i, axis, name)).cpu().numpy()
                gains[name] = gains[name] + gain if name in gains else gain
        return gains

    def _gain(self, i: int, axis: int, name: str) -> Tensor:
        """The gains by one block, kept until a permutation moves that they depend on."""
        others = {n: self.permutations[n] for n in self._depends(i, axis)}
        kept = self._kept.get((i, axis))
        if kept is not None and all(torch.equal(kept[0][n], index) for n, index in others.items()):
            return kept[1]
        if (i, axis) not in self._kept:
            return self.gain_of(i, axis, name, self.permutations)
        self._kept[i, axis] = None  # makes room
        gain = self.gain_of(i, axis, name, self.permutations)
        self._kept[i, axis] = others, gain
        return gain

    def _depends(self, i: int, axis: int) -> set[str]:
        """The permutations that the gains on an axis of a block depend on."""
        block = self.blocks[i]
        own = {*block.within[axis], axis}
        axes = {
            place
            for other in range(len(block.axes))
            if other not in own
            for place in (*block.within[other], other)
        }
        return {name for place in axes if (name := block.axes[place]) is not None}

    def gain_of(
        self, i: int, axis: int, name: str, permutations: Permutations, dtype=torch.float64
    ) -> Tensor:
        """What it is worth, by one block with all other axes permuted, to put an old position of an
        axis at a new one: [new, old], both counted through what it is within."""
        block = self.blocks[i]
        places = (*block.within[axis], axis)
        gain = _products(self.a[i], self.part(i, permutations), places, dtype)
        self.work += 2.0 * len(gain) * self.a[i].numel() * dtype.itemsize / 8
        if name in self.spec.mixed:  # by what was there before the matrices
            matrices = permutations[name].to(gain)
            gain = gain.view(len(gain), *matrices.shape[:-2], 1, matrices.shape[-1]) @ matrices
            gain = gain.view(len(gain), -1)
        old = self.positions(name, permutations).to(gain.device)
        return torch.empty_like(gain).index_copy_(1, old, gain)

    def shaped(self, name: str, matrix: Tensor) -> Tensor:
        """[new, old] as [sizes of what it is within, size] of the new position, and of the old."""
        return matrix.view(*self._shape(name) * 2)

    def _shape(self, name: str) -> tuple[int, ...]:
        """The sizes of what a permutation is within, and its own."""
        shape = tuple(self.permutations[name].shape)
        return shape[:-1] if name in self.spec.mixed else shape

    def solve(self, root: str, gains: Mapping[str, np.ndarray]) -> tuple[Permutations, float]:
        """The best permutations of a family for such gains, and by how much they are better than
        those that are."""
        found = {name: torch.empty_like(self.permutations[name]) for name in self._members[root]}
        worth, best = self._solve(root, gains, (), ())
        _write(best, found, ())
        return found, worth - self._now(root, gains, (), ())

    def _solve(self, name: str, gains: Mapping, new: tuple, old: tuple) -> tuple[float, tuple]:
        """What the best permutation is worth at these positions of what it is within, and it with
        all those within it: (name, assignment, for each position the same of what is within)."""
        size, inner = self.spec.channels[name].size, self._children(name)
        gain = gains[name][(*new, slice(None), *old)] if name in gains else np.zeros((size, size))
        if name in self.spec.mixed:
            self.work += PROCRUSTES * size**3
            matrix = nearest_orthogonal(torch.from_numpy(gain), self.spec.mixed[name].keeps_mean)
            return (matrix.numpy() * gain).sum(), (name, matrix.numpy(), [])
        below = {}
        if inner:
            gain = gain.copy()
            for i, j in itertools.product(range(size), repeat=2):
                solved = [self._solve(child, gains, (*new, i), (*old, j)) for child in inner]
                gain[i, j] += sum(worth for worth, _ in solved)
                below[i, j] = [best for _, best in solved]
        rows, best = linear_sum_assignment(gain, maximize=True)
        self.work += ASSIGNMENT * size**3
        inside = [below[i, j] for i, j in enumerate(best)] if inner else []
        return gain[rows, best].sum(), (name, best, inside)

    def _now(self, name: str, gains: Mapping, new: tuple, old: tuple) -> float:
        """What it is worth to leave everything where it is."""
        index, inner = self.permutations[name][new].numpy(), self._children(name)
        worth = 0.0
        if name in self.spec.mixed:
            gain = gains[name][(*new, slice(None), *old)] if name in gains else 0.0
            return (gain * self.permutations[name][new].numpy()).sum()
        if name in gains:
            worth = gains[name][(*new, slice(None), *old)][np.arange(len(index)), index].sum()
        for child in inner:
            worth += sum(self._now(child, gains, (*new, i), (*old, j)) for i, j in enumerate(index))
        return worth

    def _children(self, name: str) -> list[str]:
        return self._within.get((*self.spec.channels[name].within, name), [])

    def _worth(self, root: str) -> float:
        return sum(inner(self.a[i], self.part(i)) for i in self.of[root])


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


def inner(a: Tensor, b: Tensor) -> float:
    """The inner product of two tensors, in float64."""
    parts = (t.flatten().split(PART) for t in (a, b))
    return sum((x.double() @ y.double()).item() for x, y in zip(*parts, strict=True))


def _products(a: Tensor, b: Tensor, places: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[positions on some axes of a, of b], inner products over the other axes, of which a part at a
    time is copied."""
    first = tuple(range(len(places)))
    a, b = (t.movedim(places, first) for t in (a, b))
    rows, rest = math.prod(a.shape[: len(first)]), a.shape[len(first) :]
    if not rest:
        return torch.outer(a.flatten().to(dtype), b.flatten().to(dtype))
    longest = max(range(len(rest)), key=rest.__getitem__)
    step = max(1, PART * rest[longest] // max(a.numel(), 1))
    total = torch.zeros(rows, rows, dtype=dtype, device=a.device)
    for start in range(0, rest[longest], step):
        width = min(step, rest[longest] - start)
        x, y = (
            t.narrow(len(first) + longest, start, width).reshape(rows, -1).to(dtype) for t in (a, b)
        )
        total.addmm_(x, y.T)
    return total
