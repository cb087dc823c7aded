"""The symmetries of a network beyond permutations: linear maps on its axes, read off one pass.

The module is called once more, with the rules of `fastgeo.symmetry.linear`. An axis takes the
largest group of maps that everything commutes with which meets it: permutations, orthogonal maps,
or any invertible ones, with the inverse transpose where the axis is contracted with.

A norm's weight differs between channels, and no rotation of them commutes with it. Where linear
maps alone read what it gives, it can be folded into them. The axis behind it is one of its own
until the pass is over: then what is on its dual is what reads it, and the two axes become one.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from math import prod

from torch import Tensor, nn

from fastgeo.data.inputs import arguments
from fastgeo.forward.modes import looked_at
from fastgeo.forward.standin import Operation
from fastgeo.symmetry.axes import Axis, dual, permute_only, unify
from fastgeo.symmetry.carried import Value
from fastgeo.symmetry.derive import AxesPass, Symmetries
from fastgeo.symmetry.linear import STRUCTURE, only, permuting
from fastgeo.symmetry.spec import Fold, Mixing, PermutationSpec
from fastgeo.symmetry.terms import terms_of

NUMBERS = "it meets numbers that are always the same"
APART = "it is taken apart"


def with_mixing(symmetries: Symmetries, equal: Collection[str]) -> PermutationSpec:
    """The symmetries of a network with linear maps among them.

    Args:
        equal: names of parameters whose numbers are all equal, which need no folding.
    """
    spec, run = symmetries.spec, LinearPass(symmetries.module, equal)
    args, kwargs = arguments(symmetries.module, symmetries.inputs)
    with looked_at(symmetries.module):
        try:
            state, _ = run.settled(args, kwargs)
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
            why = f"the network cannot be followed: {error}"
            return replace(spec, permuted_only=dict.fromkeys(spec.channels, why))
    terms = {
        (name, term.offset, tuple(atom.size for atom in term.atoms), term.strides): term.atoms
        for name, axes in state.items()
        if prod(axis.size for axis in axes)
        for term in terms_of(axes)
    }
    met: dict[str, list[Axis | None]] = {name: [] for name in spec.channels}
    for block in spec.blocks:
        atoms = terms.get(block[:4], [None] * len(block.axes))
        for atom, name in zip(atoms, block.axes, strict=True):
            if name is not None:
                met[name].append(atom)
    whys = {name: _why_not_mixed(atoms) for name, atoms in met.items()}
    for name, own in spec.channels.items():
        if whys[name] is None:
            whys |= dict.fromkeys(own.within, "others depend on its positions")
    kinds = {name: _representative(met[name]) for name, why in whys.items() if why is None}
    behind = {name: set(spec.axes[name][0]) for name in run.weights}
    unmoved = {name for name, own in behind.items() if own and own <= kinds.keys()}
    blocks = tuple(block for block in spec.blocks if block.tensor not in unmoved)
    mixed = {}
    for name, atom in kinds.items():
        sides = None
        if dual(atom) is not atom and all(block.axes.count(name) < 2 for block in blocks):
            sides = {
                i: terms[block[:4]][block.axes.index(name)].find() is atom
                for i, block in enumerate(blocks)
                if name in block.axes
            }
        mixed[name] = Mixing(atom.keeps_mean, sides)
    lost = {name: whys[name] for own in behind.values() for name in own - kinds.keys()}
    return replace(
        spec,
        blocks=blocks,
        mixed=mixed,
        folds=tuple(fold for fold in run.folds if fold.weight in unmoved),
        permuted_only={name: why for name, why in lost.items() if why is not None},
    )


def _why_not_mixed(atoms: list[Axis | None]) -> str | None:
    """Why an axis, as it is in each part of a parameter, takes permutations alone, if it does."""
    if None in atoms:
        return APART
    own = _representative(atoms)
    for atom in (own, dual(own)):
        if atom.only or atom.why:
            return atom.only or atom.why
    same = {atom.find() for atom in atoms if atom is not None} <= {own, dual(own)}
    return None if same else APART


def _representative(atoms: list[Axis | None]) -> Axis:
    (own,) = (atom.find() for atom in atoms[:1] if atom is not None)
    return own


class LinearPass(AxesPass):
    """A pass on values on whose axes linear maps act.

    Attributes:
        weights: names of weights of norms.
        folds: how those are folded that can be.
    """

    def __init__(self, module: nn.Module, equal: Collection[str]):
        super().__init__(module)
        self.equal, self.weights = equal, dict[str, None]()
        self.folds: list[Fold] = []
        self._names = {own.tensor.data_ptr(): name for name, own in self.state.items()}
        self._scaled: list[tuple[str, Axis]] = []
        self._squares: list[tuple[Axis, Axis]] = []
        self._biases: dict[str, str | None] = {}
        parameters = dict(module.named_parameters())
        for name, value in self.state.items():
            if name not in parameters:
                only(value.axes, NUMBERS)

    def rule_of(self, known: Operation) -> Callable | None:
        if callable(known.linear):
            return partial(known.linear, self)
        rule = super().rule_of(known)
        return rule if rule is None or known.linear else permuting(rule)

    def constant(self, tensor: Tensor) -> Value:
        value = super().constant(tensor)
        only(value.axes, NUMBERS)
        return value

    def orthogonal(self, axis: Axis) -> None:
        """No more than orthogonal maps act on its positions."""
        for atom in list(axis.atoms()):
            unify(atom, dual(atom), STRUCTURE)

    def squares(self, axis: Axis) -> Axis:
        """The axis of the squares of what an axis holds."""
        if axis.is_fixed():
            return axis
        own = Axis(axis.size)
        own.squares = True
        self._squares.append((own, axis))
        return own

    def is_weight(self, weight: object, value: object) -> bool:
        """Whether one is a parameter, with a number for each position of the other's last axis."""
        return (
            isinstance(weight, Value)
            and isinstance(value, Value)
            and self._name(weight) is not None
            and weight.tensor.ndim == 1 < value.tensor.ndim
            and weight.tensor.shape[-1] == value.tensor.shape[-1]
            and not value.axes[-1].is_fixed()
        )

    def scaled(self, weight: Value, axis: Axis) -> Axis:
        """The axis behind a norm's weight."""
        name = self._name(weight)
        assert name is not None
        self.weights[name] = None
        self._scaled.append((name, axis))
        return axis if name in self.equal else weight.axes[0]

    def has_bias(self, matrix: Value, bias: Value) -> None:
        """A linear map has one."""
        name, own = self._name(matrix), self._name(bias)
        if name is not None:
            self._biases[name] = own if own not in self._biases.values() else None

    def _name(self, value: Value) -> str | None:
        """Of the parameter that it is, or a view of all of it."""
        name = self._names.get(value.tensor.data_ptr())
        same = name is not None and self.state[name].tensor.numel() == value.tensor.numel()
        return name if same else None

    def conclude(self) -> None:
        found: dict[str, Fold | None] = {}
        for name, axis in self._scaled:
            fold = self._fold(name, axis)
            found[name] = fold if found.get(name, fold) == fold else None
        self.folds = [fold for fold in found.values() if fold is not None]
        for name, axis in self._scaled:
            own = self.state[name].axes[0]
            if found[name] is None and name not in self.equal:
                why = "is read by more than linear maps of its own, and cannot be folded into them"
                permute_only(own, f"{name} {why}")
            unify(own, axis, STRUCTURE)
        for own, axis in self._squares:
            whys = [atom.only for atom in own.atoms() if atom.only is not None]
            permute_only(axis, whys[0]) if whys else self.orthogonal(axis)
            own.find().squares = False
            unify(own, axis, STRUCTURE)

    def _fold(self, weight: str, axis: Axis) -> Fold | None:
        """What a norm's weight is folded into, if linear maps alone read what it scales."""
        own, axis = self.state[weight].axes[0].find(), axis.find()
        reader = own if own.partner is None else own.partner.find()
        if weight in self.equal or own in (axis, reader) or axis in (own, reader):
            return None
        if own.kind or axis.kind or own.why or own.only or reader.why or reader.only:
            return None
        biases, readers = [], []
        for name, value in self.state.items():
            for i, other in enumerate(value.axes):
                atoms = list(other.atoms())
                if name == weight or not {own, reader} & set(atoms):
                    continue
                if name in self.weights or len(atoms) > 1:
                    return None
                if atoms == [reader]:
                    readers.append((name, i, self._biases.get(name)))
                elif value.tensor.ndim == 1:
                    biases.append(name)
                else:
                    return None
        if not readers or len(biases) > 1:
            return None
        return Fold(weight, biases[0] if biases else None, tuple(readers))
