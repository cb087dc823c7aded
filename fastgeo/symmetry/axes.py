"""What may permute the positions of an axis: an algebra, closed under what networks do to axes.

An `Axis` is n positions. It is free (any permutation of them is allowed), a product of axes (the
channels and pixels that a flatten joins, the heads and the channels within a head; row-major), or
axes laid end to end (concatenation, queries beside keys). `unify` says that two axes are permuted
alike, `fix` that one is not permuted. Both only ever shrink the group, so their order does not
matter for what is allowed, and a structure that two axes do not share leaves them fixed.

The parts of a product are nested: the permutation of a part may differ between the positions of the
parts before it, as the channels of every head or group have a permutation of their own. In a tensor
that lacks those parts it may not (`restrict`).

More than permutations may act on a free axis where only linear operations meet it: then `dual` is
what the axis is contracted with, on which the inverse transpose of a map acts. An axis that is its
own dual takes orthogonal maps alone, and `permute_only` says that one takes no more than
permutations.
"""

from collections.abc import Iterable, Iterator, Sequence
from math import prod

PRODUCT, SUM = "product", "sum"
MIXED = "its positions play different parts"


class Axis:
    """n positions and what may permute them.

    Attributes:
        size: n.
        kind: None for an atom, which is free or fixed, else PRODUCT or SUM of `parts`.
        why: the reason why it is fixed, None if it is not.
        scopes: sets of axes; the permutation may depend on positions on those in all of them.
        at: position on a fixed axis -> this axis as it is there, where it was looked at by itself.
        only: the reason why it takes permutations and no other linear maps, None if it does.
        keeps_mean: whether such a map must leave equal numbers on all positions as they are.
        squares: whether it holds the squares of what an axis holds, which only their sum is for.
        partner: its dual, if that was asked for.
    """

    def __init__(self, size: int, why: str | None = None, scopes: Iterable[frozenset] = ()):
        self.size, self.why, self.scopes = size, why, list(scopes)
        self.kind: str | None = None
        self.parts: list[Axis] = []
        self.at: dict[tuple[Axis, int], Axis] = {}
        self.same: Axis | None = None
        self.only: str | None = None
        self.keeps_mean = self.squares = False
        self.partner: Axis | None = None

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
    return composed(PRODUCT, [factor for part in parts for factor in _parts(part, PRODUCT)])


def concat(parts: Iterable[Axis]) -> Axis:
    """Axes laid end to end."""
    parts = [part for part in parts if part.size > 0]
    if len(parts) <= 1:
        return parts[0] if parts else fixed(0)
    return composed(SUM, [term for part in parts for term in _parts(part, SUM)])


def composed(kind: str, parts: list[Axis]) -> Axis:
    """The product or sum of parts."""
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


def permute_only(axis: Axis, why: str) -> None:
    """No linear maps but permutations act on its positions."""
    for atom in axis.atoms():
        if atom.only is None:
            atom.only = why


def dual(axis: Axis) -> Axis:
    """What an axis is contracted with: the inverse transpose of its map acts on it."""
    axis = axis.find()
    if axis.kind is not None:
        return composed(axis.kind, [dual(part) for part in axis.parts])
    if axis.partner is None:
        axis.partner = axis if axis.why is not None else Axis(axis.size)
        axis.partner.partner = axis
    return axis.partner.find()


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
        parts[-1].only = "it is taken apart" if axis.keeps_mean or axis.squares else axis.only
    axis.kind, axis.parts = kind, parts
    if axis.partner is not None:
        partner, axis.partner = axis.partner.find(), None
        partner.partner = None
        others = parts if partner is axis else _refine(partner, kind, sizes)
        for part, other in zip(parts, others, strict=True):
            part.partner, other.partner = other, part
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
            elif part.size % missing == 0:
                rows = [missing, part.size // missing]
                first, rest = _rows(part, *rows) if part.kind else _refine(part, PRODUCT, rows)
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


def _rows(axis: Axis, count: int, size: int) -> list[Axis]:
    """Make a product of what lies end to end: rows, in each of which the positions are permuted as
    in that part of it."""
    rows = [row.find() for row in cut(axis, [size] * count, MIXED)]
    first, rest = fixed(count, MIXED), rows[0]
    if len(set(rows)) > 1:
        rest = Axis(size, scopes=[frozenset([first])])
        rest.at = {(first, i): row for i, row in enumerate(rows)}
    axis.kind, axis.parts = PRODUCT, [first, rest]
    return axis.parts


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
        elif first.kind is None and all(size == inner for size in wanted):
            fix(first, MIXED)
            parts = [at(product(rest), first, i) for i in range(first.size)]
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
        x.only = x.only if x.only is not None else y.only
        x.keeps_mean = x.keeps_mean or y.keeps_mean
        if x.squares or y.squares:
            x.only = "its squares are not only summed"
        y.same = x
        if x.partner is None:
            x.partner = y.partner
        elif y.partner is not None:
            unify(x.partner, y.partner, why)
        for key, axis in y.at.items():
            unify(x.at.setdefault(key, axis), axis, why)
        return
    if x.kind is None:
        x, y = y, x
    pairs: list[tuple[Axis, Axis]] | None
    if y.kind is None and x.kind is not None:
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
    kind, pairs = x.kind or PRODUCT, []
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
        return composed(axis.kind, [at(part, selected, position) for part in axis.parts])
    if selected not in axis.depends_on():
        return axis
    for (other, place), own in axis.at.items():
        if other.find() is selected and place == position:
            return own
    axis.at[selected, position] = own = Axis(axis.size, axis.why)
    for scope in axis.scopes:
        whole = (wide for wide in scope if not wide.has_sum())
        atoms = {atom for wide in whole for atom in wide.atoms()} - {selected}
        restrict(own, {at(atom, selected, position) for atom in atoms})
    return own
