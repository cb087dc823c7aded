"""Tensors with the axes that their permutations act on, as the rules of operations take them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgeo.forward.standin import RUNNING, StandIn, Unfollowed
from fastgeo.symmetry.axes import Axis, fix, fixed, unify


class Value(StandIn):
    """A tensor of one network with the axes that permutations act on.

    Attributes:
        tensor: the numbers.
        axes: of each of its dimensions.
        asked: whether it was computed of parameters, or of inputs that are no integers: what a
            forward decides by such a number holds for no other network.
    """

    axes: tuple[Axis, ...]
    _asked: bool

    @staticmethod
    def __new__(cls, tensor: Tensor, axes: Iterable[Axis], asked: bool = True) -> "Value":
        one = Tensor._make_wrapper_subclass(
            cls,
            tensor.shape,
            tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )
        one.tensor, one.axes, one._asked = tensor, tuple(axes), asked
        return one

    @property
    def asked(self) -> bool:
        return self._asked or getattr(self.tensor.untyped_storage(), "asked", False)

    def write(self, values: Iterable["Value"]) -> None:
        """What was computed of these is now in its memory, and in all views of it."""
        if not self.asked and any(value.asked for value in values):
            setattr(self.tensor.untyped_storage(), "asked", True)  # noqa: B010 - of our own

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        if not RUNNING:
            raise Unfollowed(f"{func} is called on a value whose pass is over")
        return RUNNING[-1].operate(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]  # the stub has no names
        return f"Value({self.tensor})"


class NoRule(Exception):
    """A rule does not cover what it was given, and why."""


Axes = list[Axis]


def fix_all(axes: Iterable[Axis], why: str) -> Axes:
    axes = list(axes)
    for axis in axes:
        fix(axis, why)
    return axes


def unify_all(xs: Iterable[Axis], ys: Iterable[Axis]) -> None:
    for x, y in zip(xs, ys, strict=True):
        unify(x, y, "its structure differs between the tensors that meet here")


def values_in(tree: Any) -> list[Value]:
    """The values among arguments, those of slices included."""
    found = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Value):
            found.append(leaf)
        elif isinstance(leaf, slice):
            found += values_in((leaf.start, leaf.stop, leaf.step))
    return found


def joined(shape: Tensor | torch.Size, given: Iterable[Any]) -> Axes:
    """The axes of what broadcasts to a shape, or to that of a tensor, of values or their axes."""
    shape = shape.shape if isinstance(shape, Tensor) else shape
    axes: list[Axis | None] = [None] * len(shape)
    for own in given:
        own = own.axes if isinstance(own, Value) else own
        for i, axis in enumerate(reversed(own), 1):
            if axis.size == 1:
                continue
            if (met := axes[-i]) is None:
                axes[-i] = axis
            else:
                unify_all([met], [axis])
    return [fixed(size) if a is None else a for a, size in zip(axes, shape, strict=True)]


def mixed(axes: Iterable[Axis], along: Iterable[Axis]) -> list[Axes]:
    """The axes of an output, and they with those along which it mixes numbers, as of one tensor: no
    permutation may depend on positions on an axis that is in it twice."""
    axes = list(axes)
    return [axes, [*axes, *along]]


def replaced(axes: Iterable[Axis], dim: int, axis: Axis) -> Axes:
    axes = list(axes)
    axes[dim] = axis
    return axes
