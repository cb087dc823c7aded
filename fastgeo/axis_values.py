"""Tensors with the axes that their permutations act on, as the rules of operations take them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from fastgeo.axes import Axis, fix, fixed, unify


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """A tensor and its axes."""

    tensor: Tensor | None
    axes: tuple[Axis, ...]


class NoRule(Exception):
    """A rule does not cover what it was given, and why."""


Axes = list[Axis]
MIXED = "its positions play different parts"


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
    leaves: list[Any] = []
    fx.node.map_aggregate(tree, leaves.append)
    return [leaf for leaf in leaves if isinstance(leaf, Value)]


def joined(out: Tensor, values: Iterable[Any]) -> Axes:
    """The axes of what broadcasts to the output."""
    axes: list[Axis | None] = [None] * out.ndim
    for value in values:
        if not isinstance(value, Value):
            continue
        for i, axis in enumerate(reversed(value.axes), 1):
            if axis.size == 1:
                continue
            if axes[-i] is None:
                axes[-i] = axis
            else:
                unify_all([axes[-i]], [axis])
    sizes = zip(axes, out.shape, strict=True)
    return [fixed(size) if axis is None else axis for axis, size in sizes]


def replaced(axes: Iterable[Axis], dim: int, axis: Axis) -> Axes:
    axes = list(axes)
    axes[dim] = axis
    return axes
