"""The axes of all tensors of a network in accord, and the parts of a tensor that they make.

A permutation that differs between positions of another axis can be applied in a tensor that has
that axis, once; `settle` leaves no other. Then a tensor falls into parts with one axis for each
atom (`terms_of`): the summands of sums, multiplied out, the factors of products apart.
"""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from fastgeo.symmetry.axes import PRODUCT, SUM, Axis, at, composed, fix, restrict, unify


def settle(tensors: Sequence[Sequence[Axis]]) -> None:
    """Bring the axes of all tensors of a network in accord with each other.

    Afterwards a permutation depends only on positions on axes that every tensor with it has, and an
    axis that was looked at by itself is permuted as it is in the whole.
    """
    changed = True
    crossed: set[tuple] = set()
    while changed:
        changed = False
        nodes, waiting = set(), [axis for axes in tensors for axis in axes]
        while waiting:
            node = waiting.pop().find()
            if node not in nodes:
                nodes.add(node)
                waiting += [*node.parts, *node.at.values()]
        for node in nodes:
            changed |= _settle_selected(node)
        for node in nodes:
            changed |= _settle_crossed(node, crossed)
        terms = [own for axes in tensors for own in itertools.product(*map(_terms, axes))]
        for restricted in (_to_present, _to_chains):
            for atoms in set() if changed else set(terms):
                changed |= restricted(atoms)


def _settle_selected(axis: Axis) -> bool:
    changed = False
    for (selected, position), own in list(axis.at.items()):
        if axis.kind is not None:
            parts = [at(part, selected, position) for part in axis.parts]
            unify(composed(axis.kind, parts), own, "it is taken apart in two ways")
        elif selected.find() not in axis.depends_on():
            unify(axis, own, "it is taken apart in two ways")
        elif (first := at(axis, selected, position)) is not own:  # now that two are one
            unify(first, own, "it is taken apart in two ways")
        else:
            if axis.why is not None and not own.is_fixed():
                fix(own, axis.why)
                changed = True
            if axis.partner is not None and axis.only is None:
                axis.only = "it is contracted as a whole, and looked at in parts"
            if axis.only is not None and own.only is None:
                own.only = axis.only
                changed = True
            outer = [at(p, selected, position) for p in axis.depends_on()]
            changed |= _restrict_all(own, [atom for p in outer for atom in p.atoms()])
            continue
        axis.at.pop((selected, position), None)
        changed = True
    return changed


def _settle_crossed(axis: Axis, crossed: set) -> bool:
    """At a position of each of two axes it is the same, whichever is looked at first."""
    before = len(crossed) + len(axis.at)
    outer = [p for p in axis.depends_on() if p.why is not None]
    if axis.kind is None and axis.why is None and (axis.at or len(outer) > 1):
        for s in outer:
            for i in range(s.size):
                at(axis, s, i)
    for ((s, i), x), ((t, j), y) in itertools.combinations(list(axis.at.items()), 2):
        s, t = s.find(), t.find()
        if s is not t and (axis, s, i, t, j) not in crossed:
            crossed.add((axis, s, i, t, j))
            first, second = at(x, at(t, s, i), j), at(y, at(s, t, j), i)
            unify(first, second, "it is taken apart in two ways")
    return len(crossed) + len(axis.at) > before


def _restrict_all(axis: Axis, to: Sequence[Axis]) -> bool:
    """Dependences of its atoms on these and on each other; whether any was lost."""
    changed, own = False, list(axis.atoms())
    for atom in own:
        wanted = atom.depends_on()
        found = [p for p in wanted if p in to or p in own]
        if len(found) < len(wanted):
            restrict(atom, found)
            changed = True
    return changed


def _terms(axis: Axis) -> list[tuple[Axis, ...]]:
    """The atoms of each product of which it is the sum, all sums multiplied out."""
    axis = axis.find()
    if axis.kind is None:
        return [(axis,)]
    terms = [_terms(part) for part in axis.parts]
    if axis.kind == SUM:
        return [term for own in terms for term in own]
    return [sum(own, ()) for own in itertools.product(*terms)]


def _to_present(axes: tuple[tuple[Axis, ...], ...]) -> bool:
    """Dependences on what a tensor, given by the atoms of its axes, has; whether any was lost."""
    changed, everywhere = False, Counter(atom for atoms in axes for atom in atoms)
    for atoms in axes:
        here = Counter(atoms)
        for atom in atoms:
            wanted = atom.depends_on()
            found = [p for p in wanted if here[p] == 1 or (not here[p] and everywhere[p] == 1)]
            if len(found) < len(wanted):
                restrict(atom, found)
                changed = True
    return changed


def _to_chains(axes: tuple[tuple[Axis, ...], ...]) -> bool:
    """Dependences on atoms each of which depends on all before it; whether any was lost."""
    changed = False
    for atom in {atom for atoms in axes for atom in atoms}:
        wanted = sorted(atom.depends_on(), key=lambda p: len(p.depends_on()))
        chain: list[Axis] = []
        for outer in wanted:
            if set(outer.depends_on()) == set(chain):
                chain.append(outer)
        if len(chain) < len(wanted):
            restrict(atom, chain)
            changed = True
    return changed


class Term(NamedTuple):
    """A part of a tensor with an axis for each atom: `tensor.as_strided(sizes, strides, offset)`.

    Attributes:
        offset: in elements of the contiguous tensor.
        atoms: its axes.
        strides: of each, in elements.
        of: the axis of the tensor that each belongs to.
    """

    offset: int
    atoms: tuple[Axis, ...]
    strides: tuple[int, ...]
    of: tuple[int, ...]

    def outer(self, place: int) -> tuple[int, ...]:
        """The places of the atoms on which the one at a place depends, outermost first."""
        found = []
        for atom in sorted(self.atoms[place].depends_on(), key=lambda p: len(p.depends_on())):
            places = [i for i, other in enumerate(self.atoms) if other is atom]
            near = [i for i in places if self.of[i] == self.of[place]]
            (own,) = near or places
            found.append(own)
        return tuple(found)


def terms_of(axes: Sequence[Axis]) -> Iterator[Term]:
    """The parts of a contiguous tensor with such axes; of settled axes."""
    strides = [prod(axis.size for axis in axes[i + 1 :]) for i in range(len(axes))]
    waiting = [(0, list(zip(axes, strides, range(len(axes)), strict=True)))]
    while waiting:
        offset, own = waiting.pop()
        own = [(axis.find(), stride, of) for axis, stride, of in own if axis.size > 1]
        place = next((i for i, (axis, _, _) in enumerate(own) if axis.kind is not None), None)
        if place is not None:
            opened = list(_opened(*own[place]))
            for start, parts in reversed(opened):
                waiting.append((offset + start, own[:place] + parts + own[place + 1 :]))
            continue
        outer = {p for axis, *_ in own if axis.why is None for p in axis.depends_on()}
        place = next((i for i, (a, *_) in enumerate(own) if a in outer and a.why is not None), None)
        if place is None:
            yield Term(offset, *zip(*own, strict=True)) if own else Term(offset, (), (), ())
            continue
        selected, stride, _ = own.pop(place)
        for position in reversed(range(selected.size)):
            there = [(at(axis, selected, position), step, of) for axis, step, of in own]
            waiting.append((offset + position * stride, there))


def _opened(axis: Axis, stride: int, of: int) -> Iterator[tuple[int, list]]:
    """What stands for a product, or one after the other for the parts of a sum; with offsets."""
    sizes = [part.size for part in axis.parts]
    if axis.kind == PRODUCT:
        steps = [stride * prod(sizes[i + 1 :]) for i in range(len(sizes))]
        yield 0, [(part, step, of) for part, step in zip(axis.parts, steps, strict=True)]
        return
    for i, part in enumerate(axis.parts):
        yield stride * sum(sizes[:i]), [(part, stride, of)]
