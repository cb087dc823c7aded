"""How operations carry the permutations of their inputs' axes to their output's.

`FUNCTIONS` holds a rule under the function, or the name of the tensor method, that a graph calls.
A rule takes the output and what the
function takes, with `Value`s for tensors, says which axes are permuted alike or not at all, and
returns the axes of the output. With its inputs permuted like that the operation gives its output,
permuted like that. An operation without a rule, or with arguments that its rule does not cover,
leaves all axes that it meets fixed.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from fastgeo.axes import Axis, at, concat, cut, fix, fixed, product, split, unify
from fastgeo.operators import ELEMENTWISE, PYTHON
from fastgeo.values import forms, same


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


# --- Elementwise ----------------------------------------------------------------------------------


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


def _elementwise(out, *args, **kwargs):
    return joined(out, values_in((args, kwargs)))


def _kept(out, input, *args, **kwargs):
    if out.shape != input.tensor.shape:
        raise NoRule("it changes the shape")
    return list(input.axes)


def _dropout(out, input, p=0.5, training=True, inplace=False):
    if training and p:
        raise NoRule("it draws random numbers")
    return list(input.axes)


# --- Products -------------------------------------------------------------------------------------


def _matmul(out, input, other):
    x, y = list(input.axes), list(other.axes)
    inner = y.pop(-2 if len(y) > 1 else 0)
    unify_all([x.pop()], [inner])
    matrix = ([x.pop()] if x else []) + ([y.pop()] if y else [])
    batch = out.new_empty(out.shape[: out.ndim - len(matrix)], device="meta")
    return joined(batch, [Value(None, tuple(x)), Value(None, tuple(y))]) + matrix


def _einsum(out, equation, *operands):
    operands = operands[0] if isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise NoRule("its axes are not all given by letters")
    inputs, result = equation.replace(" ", "").split("->")
    named: dict[str, Axis] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(letters, operand.axes, strict=True):
            if axis.size > 1 or letter not in named:
                unify_all([named.setdefault(letter, axis)], [axis])
    return [named[letter] for letter in result]


# --- Shapes ---------------------------------------------------------------------------------------


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
    return [_replaced(input.axes, dim, part) for part in parts]


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


def _replaced(axes: Iterable[Axis], dim: int, axis: Axis) -> Axes:
    axes = list(axes)
    axes[dim] = axis
    return axes


def _narrow(out, input, dim, start, length):
    axis = input.axes[dim]
    return _replaced(input.axes, dim, _part(axis, start % axis.size, length))


def _part(axis: Axis, start: int, length: int) -> Axis:
    if length == axis.size:
        return axis
    rest = axis.size - start - length
    return cut(axis, [start, length, rest], "it is cut across its parts")[1]


def _index_select(out, input, dim, index):
    fix(input.axes[dim], MIXED)
    return _replaced(input.axes, dim, index.axes[0] if index.axes else fixed(1))


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


# --- Along an axis --------------------------------------------------------------------------------


def _reduction(out, input, dim=None, keepdim=False, **kwargs):
    """Any order of the positions that are reduced gives the same."""
    return _without(input.axes, dim, keepdim)


def _without(axes: tuple[Axis, ...], dim: Any, keepdim: bool) -> Axes:
    dims = (dim,) if isinstance(dim, int) else tuple(range(len(axes))) if dim is None else dim
    dims = {d % len(axes) for d in dims} if axes else set()
    kept = ((fixed(1) if i in dims else axis) for i, axis in enumerate(axes))
    return [axis for i, axis in enumerate(kept) if keepdim or i not in dims]


def _norm(out, input, p="fro", dim=None, keepdim=False, **kwargs):
    return _without(input.axes, dim, keepdim)


def _variance(out, input, dim=None, unbiased=None, keepdim=False, **kwargs):
    return _without(input.axes, dim, keepdim)


def _extreme(out, input, dim=None, keepdim=False):
    if dim is None:
        return []
    if isinstance(dim, Value):
        return joined(out, [input, dim])
    fix(input.axes[dim], "the number of its largest or smallest position is asked for")
    axes = _without(input.axes, dim, keepdim)
    return [axes, list(axes)]


def _along(out, input, dim=None, *args, **kwargs):
    if dim is None:
        raise NoRule("it does not say along which axis")
    return list(input.axes)


def _in_order(out, input, dim=-1, *args, **kwargs):
    """What depends on the order of the positions along an axis."""
    if not isinstance(dim, int):
        raise NoRule("it does not say along which axis")
    fix(input.axes[dim], "their order counts")
    outs = [out] if isinstance(out, Tensor) else out
    axes = []
    for own in outs:
        if own.ndim != len(input.axes):
            raise NoRule("it changes the number of axes")
        axes.append(_replaced(input.axes, dim, fixed(own.shape[dim], "their order counts")))
    return axes[0] if isinstance(out, Tensor) else axes


def _normalize(out, input, p=2.0, dim=1, eps=1e-12):
    return list(input.axes)


def _glu(out, input, dim=-1):
    halves = cut(input.axes[dim], [out.shape[dim]] * 2, "it is cut across its parts")
    unify_all(halves[:1], halves[1:])
    return _replaced(input.axes, dim, halves[0])


# --- Tables ---------------------------------------------------------------------------------------

FUNCTIONS: dict[Callable | str, Callable] = (
    {getattr(operator, name): _elementwise for name in (*PYTHON, "floordiv", "mod")}
    | forms(
        [
            *ELEMENTWISE,
            *"""acos asin atan atan2 cosh empty_like erfc exp2 fmod full_like hardshrink isfinite
            lerp log10 logaddexp nan_to_num ones_like remainder rsub sinh softshrink tan trunc
            zeros_like""".split(),
        ],
        same(_elementwise),
    )
    | forms("contiguous cpu cuda to type type_as".split(), same(_kept))
    | forms("alpha_dropout dropout feature_alpha_dropout".split(), same(_dropout))
    | forms(["dropout1d", "dropout2d", "dropout3d"], same(_dropout))
    | forms(["matmul", "bmm", "mm", "mv"], same(_matmul))
    | forms(["einsum"], same(_einsum))
    | forms("view reshape flatten unflatten squeeze unsqueeze".split(), same(_regrouped))
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
    | forms("sum mean amax amin logsumexp prod any all".split(), same(_reduction))
    | forms(["norm"], same(_norm))
    | forms(["var", "std"], same(_variance))
    | forms(["max", "min"], same(_extreme))
    | forms(["softmax", "log_softmax", "softmin"], same(_along))
    | forms("argsort cumprod cumsum flip logcumsumexp sort".split(), same(_in_order))
    | forms(["normalize"], same(_normalize))
    | forms(["glu"], same(_glu))
    | {operator.getitem: _getitem, operator.matmul: _matmul, getattr: _getattr}
)
