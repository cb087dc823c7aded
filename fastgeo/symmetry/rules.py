"""How operations carry the permutations of their inputs' axes to their output's.

A rule is of one of the operations that torch's functions are made of (torch.ops.aten), and takes
its output and what it takes, with `Value`s for tensors. It says which axes are permuted alike or
not at all, and returns the axes of the output, perhaps followed by those of further tensors. With
its inputs permuted like that the operation gives its output, permuted like that. Which operation
has which rule stands in `fastgeo.operations`; one without, or with arguments that its rule does not
cover, leaves all axes that it meets fixed.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastgeo.symmetry.axes import MIXED, Axis, at, concat, cut, fix, fixed, product, split
from fastgeo.symmetry.carried import (
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

ORDER = "their order counts"
PARTS = "it is cut across its parts"
PLACE = "the number of its largest or smallest position is asked for"
SPACE = "its positions are those of an image or a sequence"

# --- Elementwise, and reductions ------------------------------------------------------------------


def elementwise(out, *args, **kwargs):
    return joined(out, values_in((args, kwargs)))


def alike(out, *args, **kwargs):
    """Equal numbers, in any order."""
    return [Axis(size) for size in out.shape]


def reduction(out, self, dim=None, keepdim=False, **kwargs):
    """Any order of the positions that are reduced gives the same."""
    return without(self.axes, dim, keepdim)


def without(axes: tuple[Axis, ...], dim: Any, keepdim: bool) -> Axes:
    dims = (dim,) if isinstance(dim, int) else dim or tuple(range(len(axes)))
    dims = {d % len(axes) for d in dims} if axes else set()
    kept = ((fixed(1) if i in dims else axis) for i, axis in enumerate(axes))
    return [axis for i, axis in enumerate(kept) if keepdim or i not in dims]


def variance(out, self, dim=None, unbiased=True, keepdim=False, *, correction=None):
    axes = without(self.axes, None if isinstance(dim, bool) else dim, keepdim)
    return axes if isinstance(out, Tensor) else [axes, list(axes)]


def place(out, self, dim=None, keepdim=False):
    """argmax."""
    if dim is None:
        raise NoRule(PLACE)
    fix(self.axes[dim], PLACE)
    return without(self.axes, dim, keepdim)


def extreme(out, self, dim=None, keepdim=False):
    if dim is None:
        return []
    axes = place(out, self, dim, keepdim)
    return [axes, list(axes)]


def in_order(out, self, dim=-1, *args, **kwargs):
    """What depends on the order of the positions along axes."""
    dims = (dim,) if isinstance(dim, int) else dim
    if not dims:
        raise NoRule("it treats all axes as one")
    outs = [out] if isinstance(out, Tensor) else out
    axes = [list(self.axes) for _ in outs]
    for dim in dims:
        fix(self.axes[dim], ORDER)
        for made, own in zip(axes, outs, strict=True):
            made[dim] = fixed(own.shape[dim], ORDER)
    return axes + mixed(axes[0], [self.axes[dim] for dim in dims])[1:]


def stable_sort(out, self, *, stable=False, dim=-1, descending=False):
    return in_order(out, self, dim)


def at_place(out, self, k, dim=-1, *args):
    """topk and roll."""
    return in_order(out, self, dim)


# --- Layers ---------------------------------------------------------------------------------------


def matmul(out, x, y):
    x, y = list(x.axes), list(y.axes)
    inner = y.pop(-2 if len(y) > 1 else 0)
    unify_all([x.pop()], [inner])
    matrix = ([x.pop()] if x else []) + ([y.pop()] if y else [])
    return mixed(joined(out.shape[: out.ndim - len(matrix)], [x, y]) + matrix, [inner])


def conv(out, input, weight, bias, stride, padding, dilation, transposed, out_padding, groups):
    batch, channels, *image = input.axes
    outer, inner, *kernel = weight.axes
    if transposed:
        outer, inner = inner, outer
    for i, own in enumerate(kernel):  # one position by itself, or several in their order
        if own.size > 1 or out.shape[i + 2] != image[i].size or any(padding) or transposed:
            fix_all([image[i], own], SPACE)
            image[i] = space(out.shape[i + 2])
    why = f"the channels are not made of {groups} groups"
    if groups > 1 and transposed:
        group, _ = split(inner, [groups, inner.size // groups], why)
        of_group, outer = outer, Axis(groups * outer.size)
        unify_all(split(outer, [groups, of_group.size], why), [group, of_group])
    elif groups > 1:
        group, channels = split(channels, [groups, inner.size], why)
        of_weight, _ = split(outer, [groups, outer.size // groups], why)
        unify_all([group], [of_weight])
    unify_all([channels], [inner])
    if bias is not None:
        unify_all([outer], bias.axes)
    return mixed([batch, outer, *image], [inner, *input.axes[2:]])


def space(size: int) -> Axis:
    return fixed(size, SPACE)


def in_space(spatial: int) -> Callable:
    """Every channel treated alike, the axes behind the channels as space."""

    def rule(out, self, *args, **kwargs):
        outer = len(self.axes) - spatial
        fix_all(self.axes[outer:], SPACE)
        outs = [out] if isinstance(out, Tensor) else out
        axes = [[*self.axes[:outer], *map(space, own.shape[outer:])] for own in outs]
        return axes + mixed(axes[0], self.axes[outer:])[1:]

    return rule


def pad(out, self, pad, value=0):
    axes = list(self.axes)
    for i, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        if low >= 0 and high >= 0:  # equal numbers, in any order
            axes[-i] = concat([Axis(low), axes[-i], Axis(high)])
        else:
            fix(axes[-i], SPACE)
            axes[-i] = space(out.shape[-i])
    return mixed(axes, [axis for axis in self.axes if axis not in axes])


def embedding(out, weight, indices, *args):
    fix_all(weight.axes[:1], "its rows are looked up by number")
    return mixed([*indices.axes, weight.axes[1]], weight.axes[:1])


def recurrent_layer(out, input, w_ih, w_hh, b_ih, b_hh, hx, cx, *args):
    """Every gate has the hidden channels of the layer."""
    rows, hidden = w_hh.axes
    gates = concat([hidden] * (rows.size // hidden.size))
    unify_all(w_ih.axes[1:], input.axes[-1:])
    for own in (w_ih, w_hh, b_ih, b_hh):
        unify_all(own.axes[:1], [gates])
    fix_all(input.axes[:-1], SPACE)
    for state in (hx, cx):
        unify_all(state.axes[-1:], [hidden])
        fix_all(state.axes[:-1], SPACE)
    return [[*map(space, own.shape[:-1]), hidden] for own in out[:3]]


def group_norm(out, input, weight, bias, batch, size, inner, groups, eps):
    channels, group = input.axes[1], fixed(1)
    if groups > 1:
        why = f"the channels are not made of {groups} groups"
        group, _ = split(channels, [groups, size // groups], why)
    for own in (weight, bias):
        if own is not None:
            unify_all([channels], own.axes)
    statistics = [input.axes[0], group]
    return [list(input.axes), statistics, statistics, *mixed(input.axes, input.axes[1:])[1:]]


def batch_norm(out, input, *given):
    """Statistics, a weight and a bias for each channel."""
    for value in values_in(given):
        unify_all(input.axes[1:2], value.axes)
    statistics = [[fixed(size) for size in own.shape] for own in out[1:]]
    return [list(input.axes), *statistics, [*input.axes, *input.axes[:1], *input.axes[2:]]]


# --- Axes moved, joined and cut -------------------------------------------------------------------


def regrouped(out, self, *args, **kwargs):
    """view, squeeze, ...: axes split and joined, their numbers in the same order."""
    if 0 in out.shape:
        raise NoRule("its output is empty")
    left, axes = [axis for axis in self.axes if axis.size > 1], []
    sizes = list(out.shape)
    while sizes:
        have: list[Axis] = []
        want = [sizes.pop(0)]
        while (inner := prod(axis.size for axis in have)) != prod(want):
            if inner < prod(want):
                have.append(left.pop(0))
            else:
                want.append(sizes.pop(0))
        axes += split(product(have), want, "it is reshaped across its parts")
    return axes


def restrided(out, self, *args):
    """as_strided, of a tensor as it is: the strides of axes with one position are free."""
    strides = zip(out.shape, out.stride(), self.tensor.stride(), strict=True)
    if out.shape != self.tensor.shape or any(size > 1 and a != b for size, a, b in strides):
        raise NoRule("its strides are given")
    return list(self.axes)


def permute(out, self, dims):
    return [self.axes[dim] for dim in dims]


def transpose(out, self, dim0, dim1):
    axes = list(self.axes)
    axes[dim0], axes[dim1] = axes[dim1], axes[dim0]
    return axes


def expand(out, self, *args, **kwargs):
    """Where all positions are equal, any permutation will do."""
    axes = [Axis(size) for size in out.shape]
    for i, axis in enumerate(reversed(self.axes), 1):
        if axis.size > 1:
            axes[-i] = axis
    return axes


def repeat(out, self, repeats):
    axes = [Axis(size) for size in out.shape]
    for i, axis in enumerate(reversed(self.axes), 1):
        axes[-i] = product([Axis(out.shape[-i] // axis.size), axis])
    return axes


def cat(out, tensors, dim=0):
    tensors = [t for t in tensors if t.tensor.ndim == out.ndim]
    first, *others = tensors
    for other in others:
        for i, (x, y) in enumerate(zip(first.axes, other.axes, strict=True)):
            if i != dim % out.ndim:
                unify_all([x], [y])
    return replaced(first.axes, dim, concat([t.axes[dim] for t in tensors]))


def stack(out, tensors, dim=0):
    """One above the other; an axis may be permuted in each of them by itself."""
    number, axes = fixed(len(tensors), MIXED), []
    for own in zip(*(t.axes for t in tensors), strict=True):
        axis = own[0]
        if len({one.find() for one in own}) > 1:
            axis = Axis(axis.size, scopes=[frozenset([number])])
            axis.at = {(number, i): one for i, one in enumerate(own)}
        axes.append(axis)
    axes.insert(dim % out.ndim, number)
    return axes


def in_parts(out, self, sizes, dim=0):
    """chunk and split."""
    parts = cut(self.axes[dim], [own.shape[dim] for own in out], PARTS)
    return [replaced(self.axes, dim, part) for part in parts]


def unbind(out, self, dim=0):
    return [selected(self.axes, dim, i) for i in range(len(out))]


def select(out, self, dim, index):
    return selected(self.axes, dim, index % self.axes[dim].size)


def selected(axes: Iterable[Axis], dim: int, position: int) -> Axes:
    """The other axes, at one position of an axis that is fixed by that."""
    axes = list(axes)
    axis = axes.pop(dim)
    fix(axis, "one of its positions is looked at by itself")
    return [at(own, axis, position) for own in axes]


def sliced(out, self, dim=0, start=None, end=None, step=1):
    axis = self.axes[dim]
    start = slice(start, end, step).indices(axis.size)[0]
    if out.shape[dim] == axis.size or step == 1:
        return replaced(self.axes, dim, part(axis, start, out.shape[dim]))
    fix(axis, MIXED)
    return mixed(replaced(self.axes, dim, fixed(out.shape[dim], MIXED)), [axis])


def part(axis: Axis, start: int, length: int) -> Axis:
    if length == axis.size:
        return axis
    return cut(axis, [start, length, axis.size - start - length], PARTS)[1]


def finer(out, self):
    """view_as_real."""
    return [*self.axes, fixed(out.shape[-1], MIXED)]


def as_complex(out, self):
    fix(self.axes[-1], MIXED)
    return list(self.axes[:-1])


# --- Indices --------------------------------------------------------------------------------------


def index(out, self, indices):
    """x[..., i, :, j], the tensors among the indices; None for ":"."""
    axes, along, places, advanced = [], [], [], []
    waiting = iter(self.axes)
    for own in indices:
        if own is None:
            axes.append(next(waiting))
            continue
        for one in _numbers(own):
            along.append(next(waiting))
            advanced.append(one)
            places.append(len(axes))
    axes += waiting
    first = places[0] if len(set(places)) == 1 else 0  # or they are not side by side
    shape = torch.broadcast_shapes(*(one.tensor.shape for one in advanced))
    axes[first:first] = joined(shape, advanced)
    return mixed(axes, fix_all(along, MIXED))


def _numbers(index: Value) -> list[Value]:
    """An index, a mask as the numbers of what it selects along each axis."""
    if index.tensor.dtype not in (torch.bool, torch.uint8):
        return [index]
    fix_all(index.axes, MIXED)
    found = index.tensor.nonzero(as_tuple=True)
    return [Value(own, [fixed(len(own), MIXED)]) for own in found]


def index_put(out, self, indices, values, accumulate=False):
    place, *further = index(out, self, indices)
    joined(torch.Size(axis.size for axis in place), [place, values])
    return [list(self.axes), *further]


def gather(out, self, dim, index, **kwargs):
    by_number(self, dim, index)
    return mixed(index.axes, [self.axes[dim]])


def scatter(out, self, dim, index, src=None, *args, **kwargs):
    by_number(self, dim, index)
    if isinstance(src, Value) and src.axes:
        begin_alike(src.axes, index.axes)
    return mixed(self.axes, [index.axes[dim]])


def by_number(self: Value, dim: int, index: Value) -> None:
    """Look up positions along an axis, for each of an index along the others."""
    fix(self.axes[dim], MIXED)
    begin_alike(replaced(self.axes, dim, index.axes[dim]), index.axes)


def begin_alike(axes: Iterable[Axis], shorter: Iterable[Axis]) -> None:
    for axis, own in zip(axes, shorter, strict=True):
        unify_all([part(axis, 0, own.size)], [own])
