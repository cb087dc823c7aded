"""Rules, as in `axis_rules.py`, of operations that move, join, cut or pick the axes of a tensor."""

import operator
from collections.abc import Callable, Iterable
from math import prod

import torch

from fastgeo.axes import Axis, at, concat, cut, fix, fixed, product, split
from fastgeo.axis_values import MIXED, Axes, NoRule, Value, joined, replaced, unify_all
from fastgeo.values import forms, same


def _regrouped(out, input, *args, **kwargs):
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


def _permute(out, input, *dims):
    dims = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    return [input.axes[dim] for dim in dims]


def _transpose(out, input, dim0, dim1):
    axes = list(input.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return axes


def _t(out, input):
    return list(reversed(input.axes))


def _movedim(out, input, source, destination):
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


def _expand(out, input, *args, **kwargs):
    """Where all positions are equal, any permutation will do."""
    axes = [Axis(size) for size in out.shape]
    for i, axis in enumerate(reversed(input.axes), 1):
        if axis.size > 1:
            axes[-i] = axis
    return axes


def _repeat(out, input, *args, **kwargs):
    axes = [Axis(size) for size in out.shape]
    for i, axis in enumerate(reversed(input.axes), 1):
        axes[-i] = product([Axis(out.shape[-i] // axis.size), axis])
    return axes


def _repeat_interleave(out, input, repeats, dim=None, **kwargs):
    if not isinstance(repeats, int) or dim is None:
        raise NoRule("it repeats by different numbers")
    axes = list(input.axes)
    axes[dim] = product([axes[dim], Axis(repeats)])
    return axes


def _cat(out, tensors, dim=0):
    tensors = [t for t in tensors if t.tensor.ndim == out.ndim]
    first, *others = tensors
    for other in others:
        for i, (x, y) in enumerate(zip(first.axes, other.axes, strict=True)):
            if i != dim % out.ndim:
                unify_all([x], [y])
    axes = list(first.axes)
    axes[dim] = concat([t.axes[dim] for t in tensors])
    return axes


def _stack(out, tensors, dim=0):
    first, *others = tensors
    for other in others:
        unify_all(first.axes, other.axes)
    axes = list(first.axes)
    axes.insert(dim % out.ndim, fixed(len(tensors), MIXED))
    return axes


def _cut(out, input, _, dim=0):
    """chunk and split."""
    parts = cut(input.axes[dim], [own.shape[dim] for own in out], "it is cut across its parts")
    return [replaced(input.axes, dim, part) for part in parts]


def _unbind(out, input, dim=0):
    return [_selected(input.axes, dim % len(input.axes), i) for i in range(len(out))]


def _select(out, input, dim, index):
    dim = dim % len(input.axes)
    return _selected(input.axes, dim, index % input.axes[dim].size)


def _selected(axes: Iterable[Axis], dim: int, position: int) -> Axes:
    """The other axes, at one position of an axis that is fixed by that."""
    axes = list(axes)
    axis = axes.pop(dim)
    fix(axis, "one of its positions is looked at by itself")
    return [at(own, axis, position) for own in axes]


def _narrow(out, input, dim, start, length):
    axis = input.axes[dim]
    return replaced(input.axes, dim, _part(axis, start % axis.size, length))


def _part(axis: Axis, start: int, length: int) -> Axis:
    if length == axis.size:
        return axis
    rest = axis.size - start - length
    return cut(axis, [start, length, rest], "it is cut across its parts")[1]


def _index_select(out, input, dim, index):
    fix(input.axes[dim], MIXED)
    return replaced(input.axes, dim, index.axes[0] if index.axes else fixed(1))


def _getitem(out, input, index):
    index = list(index) if isinstance(index, tuple) else [index]
    taken = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis in [i for i in index if not isinstance(i, Value)]:
        place = next(p for p, i in enumerate(index) if i is Ellipsis)
    else:
        place = len(index)
    index[place : place + 1] = [slice(None)] * (len(input.axes) - taken)
    axes, advanced, places, selected = [], [], [], []
    waiting = iter(input.axes)
    for i in index:
        if i is None:
            axes.append(fixed(1))
            continue
        axis = next(waiting)
        if isinstance(i, slice):
            start, stop, step = i.indices(axis.size)
            size = len(range(start, stop, step))
            if step == 1 or size == axis.size:
                axes.append(_part(axis, start, size))
            else:
                fix(axis, MIXED)
                axes.append(fixed(size, MIXED))
        elif isinstance(i, int) and not isinstance(i, bool):
            selected.append((axis, i % axis.size))
            places.append(None)
        elif isinstance(i, Value) and i.tensor.dtype not in (torch.bool, torch.uint8):
            fix(axis, MIXED)
            advanced.append(i)
            places.append(len(axes))
        else:
            raise NoRule("it is indexed by more than numbers and slices")
    for axis, position in selected:
        fix(axis, "one of its positions is looked at by itself")
        axes = [at(own, axis, position) for own in axes]
    if advanced:
        if len(set(places)) > 1 or None in places:
            raise NoRule("its indices are not side by side")
        shape = torch.broadcast_shapes(*(i.tensor.shape for i in advanced))
        axes[places[0] : places[0]] = joined(torch.empty(shape, device="meta"), advanced)
    return axes


def _getattr(out, input, name):
    if name not in ("mT", "T", "data"):
        raise NoRule(f"{name} is no view")
    axes = list(input.axes)
    if name == "T":
        axes.reverse()
    elif name == "mT":
        axes[-2:] = axes[:-3:-1]
    return axes


FUNCTIONS: dict[Callable | str, Callable] = (
    forms("view reshape flatten unflatten squeeze unsqueeze".split(), same(_regrouped))
    | forms(["view_as", "reshape_as"], same(_regrouped))
    | forms(["permute"], same(_permute))
    | forms(["transpose", "swapaxes", "swapdims"], same(_transpose))
    | forms(["t"], same(_t))
    | forms(["movedim", "moveaxis"], same(_movedim))
    | forms(["expand", "expand_as", "broadcast_to"], same(_expand))
    | forms(["repeat", "tile"], same(_repeat))
    | forms(["repeat_interleave"], same(_repeat_interleave))
    | forms(["cat", "concat", "concatenate"], same(_cat))
    | forms(["stack"], same(_stack))
    | forms(["chunk", "split"], same(_cut))
    | forms(["unbind"], same(_unbind))
    | forms(["select"], same(_select))
    | forms(["narrow"], same(_narrow))
    | forms(["index_select"], same(_index_select))
    | {operator.getitem: _getitem, getattr: _getattr}
)
