"""What may permute the positions of an axis: an algebra, closed under what networks do to axes.

An `Axis` is n positions. It is free (any permutation of them is allowed), a product of axes (the
channels and pixels that a flatten joins, the heads and the channels within a head; row-major), or
axes laid end to end (concatenation, queries beside keys). `unify` says that two axes are permuted
alike, `fix` that one is not permuted. Both only ever shrink the group, so their order does not
matter for what is allowed, and a structure that two axes do not share leaves them fixed.

The parts of a product are nested: the permutation of a part may differ between the positions of the
parts before it, as the channels of every head or group have a permutation of their own. In a tensor
that lacks those parts it may not (`restrict`).
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

PRODUCT, SUM = "product", "sum"


class Axis:
    """n positions and what may permute them.

    Attributes:
        size: n.
        kind: None for an atom, which is free or fixed, else PRODUCT or SUM of `parts`.
        why: the reason why it is fixed, None if it is not.
        scopes: sets of axes; the permutation may depend on positions on those in all of them.
        at: position on a fixed axis -> this axis as it is there, where it was looked at by itself.
    """

    def __init__(self, size: int, why: str | None = None, scopes: Iterable[frozenset] = ()):
        self.size, self.why, self.scopes = size, why, list(scopes)
        self.kind: str | None = None
        self.parts: list[Axis] = []
        self.at: dict[tuple[Axis, int], Axis] = {}
        self.same: Axis | None = None

    def find(self) -> "Axis":
        """The one that stands for all that are permuted alike."""
        axis = self
        while axis.same is not None:
            axis = axis.same
        if self is not axis:
            self.same = axis
        return axis

    def atoms(self) -> "Iterator[Axis]":
        """The free and fixed ones that it is made of, from left to right."""
        axis = self.find()
        if axis.kind is None:
            yield axis
        for part in axis.parts:
            yield from part.atoms()

    def is_fixed(self) -> bool:
        return all(atom.why is not None or atom.size == 1 for atom in self.atoms())

    def depends_on(self) -> "list[Axis]":
        """The atoms on whose positions the permutation of this atom may depend."""
        common: set[Axis] | None = None
        for scope in self.find().scopes:
            found = {atom for axis in scope if not axis.has_sum() for atom in axis.atoms()}
            common = found if common is None else common & found
        return [atom for atom in common or () if atom is not self.find() and atom.size > 1]

    def has_sum(self) -> bool:
        axis = self.find()
        return axis.kind == SUM or any(part.has_sum() for part in axis.parts)


def fixed(size: int, why: str = "it has one position") -> Axis:
    return Axis(size, why)


def product(parts: Iterable[Axis]) -> Axis:
    """The axis that a flatten makes of neighbouring ones."""
    parts = [part for part in parts if part.size > 1]
    if len(parts) <= 1:
        return parts[0] if parts else fixed(1)
    return _made(PRODUCT, [factor for part in parts for factor in _parts(part, PRODUCT)])


def concat(parts: Iterable[Axis]) -> Axis:
    """Axes laid end to end."""
    parts = [part for part in parts if part.size > 0]
    if len(parts) <= 1:
        return parts[0] if parts else fixed(0)
    return _made(SUM, [term for part in parts for term in _parts(part, SUM)])


def _made(kind: str, parts: list[Axis]) -> Axis:
    axis = Axis((prod if kind == PRODUCT else sum)(part.size for part in parts))
    axis.kind, axis.parts = kind, parts
    return axis


def _parts(axis: Axis, kind: str) -> list[Axis]:
    axis = axis.find()
    if axis.kind != kind:
        return [axis]
    return [part for own in axis.parts for part in _parts(own, kind)]


def fix(axis: Axis, why: str) -> None:
    """None of its positions may move."""
    for atom in axis.atoms():
        if atom.why is None:
            atom.why = why


def restrict(atom: Axis, to: Iterable[Axis]) -> None:
    """Its permutation may depend on positions on these axes at most."""
    atom.find().scopes.append(frozenset(to))


def _refine(axis: Axis, kind: str, sizes: Sequence[int]) -> list[Axis]:
    """Allow a free axis only the permutations of a product, or of a sum."""
    parts: list[Axis] = []
    for size in sizes:
        scopes = axis.scopes
        if kind == PRODUCT and parts:
            scopes = [scope | frozenset(parts) for scope in scopes or [frozenset()]]
        parts.append(Axis(size, axis.why, scopes))
    axis.kind, axis.parts = kind, parts
    return parts


def split(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    """The parts, of these sizes, whose product it becomes; fixed, and why, if it cannot."""
    left, found = _parts(axis, PRODUCT), []
    for size in sizes:
        own, missing = [], size
        while missing > 1 and left:
            part = left.pop(0).find()
            if part.kind == PRODUCT:
                left = _parts(part, PRODUCT) + left
            elif part.size and missing % part.size == 0:
                own.append(part)
                missing //= part.size
            elif part.kind is None and part.size % missing == 0:
                first, rest = _refine(part, PRODUCT, [missing, part.size // missing])
                own.append(first)
                left.insert(0, rest)
                missing = 1
            else:
                break
        if missing != 1:
            fix(axis, why)
            return [fixed(size, why) for size in sizes]
        found.append(product(own))
    return found


def cut(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    """The parts, of these sizes, that lie end to end in it; fixed, and why, if they cannot."""
    axis, wanted = axis.find(), [size for size in sizes if size > 0]
    if len(wanted) <= 1:
        parts = [axis]
    elif axis.kind is None:
        parts = _refine(axis, SUM, wanted)
    elif axis.kind == PRODUCT:
        first, *rest = _parts(axis, PRODUCT)
        inner = prod(part.size for part in rest)
        if any(size % inner for size in wanted):
            parts = None
        else:
            own = cut(first, [size // inner for size in wanted], why)
            parts = [product([part, *rest]) for part in own]
    else:
        parts = _cut_sum(_parts(axis, SUM), wanted, why)
    if parts is None:
        fix(axis, why)
        return [fixed(size, why) for size in sizes]
    found = iter(parts)
    return [next(found) if size > 0 else fixed(0) for size in sizes]


def _cut_sum(left: list[Axis], sizes: list[int], why: str) -> list[Axis]:
    found = []
    for size in sizes:
        own, missing = [], size
        while missing:
            part = left.pop(0)
            if part.size > missing:
                part, rest = cut(part, [missing, part.size - missing], why)
                left.insert(0, rest)
            own.append(part)
            missing -= part.size
        found.append(concat(own))
    return found


def unify(x: Axis, y: Axis, why: str) -> None:
    """The two are permuted alike, or fixed, and why, where their structures do not fit."""
    x, y = x.find(), y.find()
    if x is y:
        return
    if x.size != y.size:
        fix(x, why)
        fix(y, why)
        return
    if x.kind is None and y.kind is None:
        x.why = x.why if x.why is not None else y.why
        x.scopes += y.scopes
        y.same = x
        for key, axis in y.at.items():
            unify(x.at.setdefault(key, axis), axis, why)
        return
    if x.kind is None:
        x, y = y, x
    if y.kind is None:
        pairs = list(zip(x.parts, _refine(y, x.kind, [part.size for part in x.parts]), strict=True))
    else:
        pairs = _aligned(x, y, why)
    if pairs is None:
        fix(x, why)
        fix(y, why)
        return
    for left, right in pairs:
        unify(left, right, why)


def _aligned(x: Axis, y: Axis, why: str) -> list[tuple[Axis, Axis]] | None:
    """Parts of two axes that are permuted alike if the axes are; None where there are none."""
    if x.kind != y.kind:
        x, y = (x, y) if x.kind == SUM else (y, x)
        terms = _parts(x, SUM)
        return list(zip(terms, cut(y, [term.size for term in terms], why), strict=True))
    kind, pairs = x.kind, []
    xs, ys = _parts(x, kind), _parts(y, kind)
    while xs and ys:
        a, b = xs.pop(0), ys.pop(0)
        if a.size != b.size:
            (large, rest), small = ((a, xs), b) if a.size > b.size else ((b, ys), a)
            if kind == PRODUCT:
                if large.size % small.size:
                    return None
                first, last = split(large, [small.size, large.size // small.size], why)
            else:
                first, last = cut(large, [small.size, large.size - small.size], why)
            rest.insert(0, last)
            a, b = (first, b) if a is large else (a, first)
        pairs.append((a, b))
    return pairs


def at(axis: Axis, selected: Axis, position: int) -> Axis:
    """An axis as it is at one position of another, fixed one, of the same tensor."""
    selected = selected.find()
    if selected.kind is not None or selected.size == 1:
        return axis
    axis = axis.find()
    if axis.kind is not None:
        return _made(axis.kind, [at(part, selected, position) for part in axis.parts])
    if selected not in axis.depends_on():
        return axis
    if (selected, position) not in axis.at:
        own = Axis(axis.size, axis.why)
        for scope in axis.scopes:
            atoms = {atom for wide in scope for atom in wide.atoms()} - {selected}
            restrict(own, {at(atom, selected, position) for atom in atoms})
        axis.at[selected, position] = own
    return axis.at[selected, position]


def settle(tensors: Sequence[Sequence[Axis]]) -> None:
    """Bring the axes of all tensors of a network in accord with each other.

    Afterwards a permutation depends only on positions on axes that every tensor with it has, and an
    axis that was looked at by itself is permuted as it is in the whole.
    """
    changed = True
    while changed:
        changed = False
        for node in {node for axes in tensors for axis in axes for node in _nodes(axis)}:
            changed |= _settle_selected(node)
        terms = [own for axes in tensors for own in itertools.product(*map(_terms, axes))]
        for restricted in (_to_present, _to_chains):
            for atoms in set() if changed else set(terms):
                changed |= restricted(atoms)


def _nodes(axis: Axis) -> Iterator[Axis]:
    axis = axis.find()
    yield axis
    for part in axis.parts:
        yield from _nodes(part)


def _settle_selected(axis: Axis) -> bool:
    changed = False
    for (selected, position), own in list(axis.at.items()):
        if axis.kind is not None:
            parts = [at(part, selected, position) for part in axis.parts]
            unify(_made(axis.kind, parts), own, "it is taken apart in two ways")
        elif selected.find() not in axis.depends_on():
            unify(axis, own, "it is taken apart in two ways")
        else:
            if axis.why is not None and not own.is_fixed():
                fix(own, axis.why)
                changed = True
            continue
        axis.at.pop((selected, position), None)
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
        wanted, chain = sorted(atom.depends_on(), key=lambda p: len(p.depends_on())), []
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
