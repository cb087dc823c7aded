"""How operations carry the permutations of their inputs' axes to their output's.

Which function has which rule stands in `fastgeo.operations`; those of operations on the axes
themselves are in `axis_shapes.py`. A rule takes the output and what the function takes, with
`Value`s for tensors, says which axes are permuted alike or not at all, and returns the axes of the
output. With its inputs permuted like that the operation gives its
output, permuted like that. An operation without a rule, or with arguments that its rule does not
cover, leaves all axes that it meets fixed.
"""

from typing import Any

from torch import Tensor

from fastgeo.symmetry.axes import Axis, cut, fix, fixed
from fastgeo.symmetry.values import (
    Axes,
    NoRule,
    Value,
    joined,
    mixed,
    replaced,
    unify_all,
    values_in,
)

PLACE = "the number of its largest or smallest position is asked for"

# --- Elementwise ----------------------------------------------------------------------------------


def elementwise(out, *args, **kwargs):
    if not isinstance(out, Tensor):
        raise NoRule("it gives positions")  # where, of a condition alone
    return joined(out, values_in((args, kwargs)))


def kept(out, input, *args, **kwargs):
    if out.shape != input.tensor.shape:
        raise NoRule("it changes the shape")
    return list(input.axes)


def dropout(out, input, p=0.5, training=True, inplace=False):
    if training and p:
        raise NoRule("it draws random numbers")
    return list(input.axes)


def alike(out, *args, **kwargs):
    """Equal numbers, in any order."""
    return [Axis(size) for size in out.shape]


# --- Products -------------------------------------------------------------------------------------


def matmul(out, input, other):
    x, y = list(input.axes), list(other.axes)
    inner = y.pop(-2 if len(y) > 1 else 0)
    unify_all([x.pop()], [inner])
    matrix = ([x.pop()] if x else []) + ([y.pop()] if y else [])
    return mixed(joined(out.shape[: out.ndim - len(matrix)], [x, y]) + matrix, [inner])


def added_matmul(out, input, x, y, **kwargs):
    axes, mixing = matmul(out, x, y)
    return [joined(out, [input, axes]), mixing]


def outer(out, input, vec2):
    return [*input.axes, *vec2.axes]


def einsum(out, equation, *operands):
    operands = operands[0] if isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str):
        raise NoRule("its axes are not given by letters")
    inputs, arrow, result = equation.replace(" ", "").replace("...", ".").partition("->")
    if not arrow:
        once = {letter for letter in inputs if inputs.count(letter) == 1 and letter.isalpha()}
        result = "." + "".join(sorted(once))
    named: dict[str, Axis] = {}
    widest = ""
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        dots = "9876543210"[10 - len(operand.axes) + len(letters.replace(".", "")) :]
        widest = max(widest, dots, key=len)
        for letter, axis in zip(letters.replace(".", dots), operand.axes, strict=True):
            if axis.size > 1:
                unify_all([named.setdefault(letter, axis)], [axis])
    result = result.replace(".", widest)
    along = [axis for letter, axis in named.items() if letter not in result]
    return mixed((named.get(letter, fixed(1)) for letter in result), along)


# --- Along an axis --------------------------------------------------------------------------------


def reduction(out, input, dim=None, keepdim=False, **kwargs):
    """Any order of the positions that are reduced gives the same."""
    return without(input.axes, dim, keepdim)


def without(axes: tuple[Axis, ...], dim: Any, keepdim: bool) -> Axes:
    dims = (dim,) if isinstance(dim, int) else tuple(range(len(axes))) if dim is None else dim
    dims = {d % len(axes) for d in dims} if axes else set()
    kept = ((fixed(1) if i in dims else axis) for i, axis in enumerate(axes))
    return [axis for i, axis in enumerate(kept) if keepdim or i not in dims]


def norm(out, input, p="fro", dim=None, keepdim=False, **kwargs):
    return without(input.axes, dim, keepdim)


def variance(out, input, dim=None, unbiased=None, keepdim=False, **kwargs):
    axes = without(input.axes, dim, keepdim)
    return axes if isinstance(out, Tensor) else [axes, list(axes)]


def place(out, input, dim=None, keepdim=False):
    """argmax."""
    if dim is None:
        raise NoRule(PLACE)
    fix(input.axes[dim], PLACE)
    return without(input.axes, dim, keepdim)


def extreme(out, input, dim=None, keepdim=False):
    if dim is None:
        return []
    if isinstance(dim, Value):
        return joined(out, [input, dim])
    axes = place(out, input, dim, keepdim)
    return [axes, list(axes)]


def along(out, input, dim=None, *args, **kwargs):
    if dim is None:
        raise NoRule("it does not say along which axis")
    return mixed(input.axes, [input.axes[dim]])


def in_order(out, input, dim=-1, *args, **kwargs):
    """What depends on the order of the positions along axes."""
    dims = (dim,) if isinstance(dim, int) else dim
    outs = [out] if isinstance(out, Tensor) else out
    axes = [list(input.axes) for _ in outs]
    for dim in dims:
        fix(input.axes[dim], "their order counts")
        for made, own in zip(axes, outs, strict=True):
            made[dim] = fixed(own.shape[dim], "their order counts")
    return axes + mixed(axes[0], [input.axes[dim] for dim in dims])[1:]


def flip(out, input, *given, dims=None):
    dims = given if dims is None else dims
    return in_order(out, input, dims[0] if len(dims) == 1 else dims)


def roll(out, input, shifts, dims=()):
    if dims == ():
        raise NoRule("it rolls all axes as one")
    return in_order(out, input, dims)


def largest(out, input, k, dim=-1, *args, **kwargs):
    """topk."""
    return in_order(out, input, dim)


def glu(out, input, dim=-1):
    halves = cut(input.axes[dim], [out.shape[dim]] * 2, "it is cut across its parts")
    unify_all(halves[:1], halves[1:])
    return replaced(input.axes, dim, halves[0])
