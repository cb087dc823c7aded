"""Rules, as in `axis_rules.py`, of operations that move, join, cut or pick the axes of a tensor."""

from collections.abc import Iterable
from math import prod
from typing import Any

import torch

from fastgeo.symmetry.axes import MIXED, Axis, at, concat, cut, fix, fixed, product, split
from fastgeo.symmetry.values import (
    Axes,
    NoRule,
    Value,
    fix_all,
    joined,
    mixed,
    replaced,
    unify_all,
    values_in,
)


def regrouped(out, input, *args, **kwargs):
    """view, flatten, squeeze, ...: axes split and joined, their numbers in the same order."""
    if 0 in out.shape:
        raise NoRule("its output is empty")
    left, axes = [axis for axis in input.axes if axis.size > 1], []
    sizes = list(out.shape)
    while sizes:
        have, want = [], [sizes.pop(0)]
        while (inner := prod(axis.size for axis in have)) != prod(want):
            if inner < prod(want):
                have.append(left.pop(0))
            else:
                want.append(sizes.pop(0))
        axes += split(product(have), want, "it is reshaped across its parts")
    return axes


def permute(out, input, *dims):
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return [input.axes[dim] for dim in dims]


def transpose(out, input, dim0, dim1):
    axes = list(input.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return axes


def t(out, input):
    return list(reversed(input.axes))


def movedim(out, input, source, destination):
    rank = len(input.axes)
    source, destination = (
        [dim % rank for dim in ((own,) if isinstance(own, int) else own)]
        for own in (source, destination)
    )
    axes: list[Axis | None] = [None] * rank
    for here, there in zip(source, destination, strict=True):
        axes[there] = input.axes[here]
    rest = (axis for i, axis in enumerate(input.axes) if i not in source)
    return [next(rest) if axis is None else axis for axis in axes]


def expand(out, input, *args, **kwargs):
    """Where all positions are equal, any permutation will do."""
    axes = [Axis(size) for size in out.shape]
    for i, axis in enumerate(reversed(input.axes), 1):
        if axis.size > 1:
            axes[-i] = axis
    return axes


def repeat(out, input, *args, **kwargs):
    axes = [Axis(size) for size in out.shape]
    for i, axis in enumerate(reversed(input.axes), 1):
        axes[-i] = product([Axis(out.shape[-i] // axis.size), axis])
    return axes


def repeat_interleave(out, input, repeats, dim=None, **kwargs):
    if dim is None:
        raise NoRule("it does not say along which axis")
    if isinstance(repeats, int):
        return replaced(input.axes, dim, product([input.axes[dim], Axis(repeats)]))
    fix(input.axes[dim], MIXED)
    return mixed(replaced(input.axes, dim, fixed(out.shape[dim], MIXED)), [input.axes[dim]])


def cat(out, tensors, dim=0):
    tensors = [t for t in tensors if t.tensor.ndim == out.ndim]
    first, *others = tensors
    for other in others:
        for i, (x, y) in enumerate(zip(first.axes, other.axes, strict=True)):
            if i != dim % out.ndim:
                unify_all([x], [y])
    axes = list(first.axes)
    axes[dim] = concat([t.axes[dim] for t in tensors])
    return axes


def stack(out, tensors, dim=0):
    first, *others = tensors
    for other in others:
        unify_all(first.axes, other.axes)
    axes = list(first.axes)
    axes.insert(dim % out.ndim, fixed(len(tensors), MIXED))
    return axes


def in_parts(out, input, *given, dim=None, **kwargs):
    """chunk and split."""
    dim = (given[1] if len(given) > 1 else 0) if dim is None else dim
    parts = cut(input.axes[dim], [own.shape[dim] for own in out], "it is cut across its parts")
    return [replaced(input.axes, dim, part) for part in parts]


def unbind(out, input, dim=0):
    return [selected(input.axes, dim % len(input.axes), i) for i in range(len(out))]


def select(out, input, dim, index):
    dim = dim % len(input.axes)
    return selected(input.axes, dim, index % input.axes[dim].size)


def selected(axes: Iterable[Axis], dim: int, position: int) -> Axes:
    """The other axes, at one position of an axis that is fixed by that."""
    axes = list(axes)
    axis = axes.pop(dim)
    fix(axis, "one of its positions is looked at by itself")
    return [at(own, axis, position) for own in axes]


def narrow(out, input, dim, start, length):
    axis = input.axes[dim]
    return replaced(input.axes, dim, part(axis, start % axis.size, length))


def part(axis: Axis, start: int, length: int) -> Axis:
    if length == axis.size:
        return axis
    rest = axis.size - start - length
    return cut(axis, [start, length, rest], "it is cut across its parts")[1]


def index_select(out, input, dim, index):
    axis = input.axes[dim]
    fix(axis, MIXED)
    return mixed(replaced(input.axes, dim, index.axes[0] if index.axes else fixed(1)), [axis])


def index_add(out, input, dim, index, source, **kwargs):
    """index_copy and index_fill, too."""
    fix(input.axes[dim], MIXED)
    if isinstance(source, Value) and source.axes:
        unify_all(replaced(input.axes, dim, index.axes[0]), source.axes)
    return mixed(input.axes, index.axes)


def gather(out, input, dim, index, **kwargs):
    by_number(input, dim, index)
    return mixed(index.axes, [input.axes[dim]])


def scatter(out, input, dim, index, src=None, **kwargs):
    by_number(input, dim, index)
    if isinstance(src, Value) and src.axes:
        begin_alike(src.axes, index.axes)
    return mixed(input.axes, [index.axes[dim]])


def by_number(input: Value, dim: int, index: Value) -> None:
    """Look up positions along an axis, for each of an index along the others."""
    fix(input.axes[dim], MIXED)
    begin_alike(replaced(input.axes, dim, index.axes[dim]), index.axes)


def begin_alike(axes: Iterable[Axis], shorter: Iterable[Axis]) -> None:
    for axis, own in zip(axes, shorter, strict=True):
        unify_all([part(axis, 0, own.size)], [own])


def getitem(out, input, index):
    index = list(index) if isinstance(index, tuple) else [index]
    index = [own for i in index for own in _numbers(i)]
    taken = sum(i is not None and i is not Ellipsis for i in index)
    place = next((p for p, i in enumerate(index) if i is Ellipsis), len(index))
    index[place : place + 1] = [slice(None)] * (len(input.axes) - taken)
    axes, advanced, places, selected, along = [], [], [], [], []
    waiting = iter(input.axes)
    for i in index:
        if i is None:
            axes.append(fixed(1))
            continue
        axis = next(waiting)
        if isinstance(i, slice):
            if any(bound.asked for bound in values_in(i)):
                raise NoRule("it is cut where the numbers say")
            bounds = (b.tensor if isinstance(b, Value) else b for b in (i.start, i.stop, i.step))
            start, stop, step = slice(*bounds).indices(axis.size)
            size = len(range(start, stop, step))
            if step == 1 or size == axis.size:
                axes.append(part(axis, start, size))
            else:
                along.append(axis)
                axes.append(fixed(size, MIXED))
        elif isinstance(i, int) and not isinstance(i, bool):
            selected.append((axis, i % axis.size))
        elif isinstance(i, Value):
            along.append(axis)
            advanced.append(i)
            places.append(len(axes))
        else:
            raise NoRule("it is indexed by more than numbers and slices")
    for axis, position in selected:
        fix(axis, "one of its positions is looked at by itself")
        axes = [at(own, axis, position) for own in axes]
    if advanced:
        first = places[0] if len(set(places)) == 1 else 0  # or they are not side by side
        shape = torch.broadcast_shapes(*(i.tensor.shape for i in advanced))
        axes[first:first] = joined(shape, advanced)
    return mixed(axes, fix_all(along, MIXED))


def _numbers(index: Any) -> list[Any]:
    """An index, a mask as the numbers of what it selects along each axis."""
    if isinstance(index, list):
        index = torch.tensor(index)
        index = Value(index, [fixed(size, MIXED) for size in index.shape])
    if not isinstance(index, Value) or index.tensor.dtype not in (torch.bool, torch.uint8):
        return [index]
    fix_all(index.axes, MIXED)
    found = index.tensor.nonzero(as_tuple=True)
    return [Value(own, [fixed(len(own), MIXED)]) for own in found]


def finer(out, input, *args, **kwargs):
    """one_hot, view_as_real."""
    return [*input.axes, fixed(out.shape[-1], MIXED)]


def as_complex(out, input):
    fix(input.axes[-1], MIXED)
    return list(input.axes[:-1])


def same(out, input):
    return list(input.axes)


def turned(out, input):
    """x.mT."""
    axes = list(input.axes)
    axes[-2:] = axes[:-3:-1]
    return axes
