"""How operations carry the permutations of their inputs' axes to their output's.

`FUNCTIONS` holds a rule under the function, or the name of the tensor method, that a graph calls;
those of operations on the axes themselves stand in `axis_shapes.py`. A rule takes the output and
what the function takes, with `Value`s for tensors, says which axes are permuted alike or not at
all, and returns the axes of the output. With its inputs permuted like that the operation gives its
output, permuted like that. An operation without a rule, or with arguments that its rule does not
cover, leaves all axes that it meets fixed.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastgeo.axes import Axis, cut, fix, fixed
from fastgeo.axis_values import Axes, NoRule, Value, joined, replaced, unify_all, values_in
from fastgeo.operators import ELEMENTWISE, PYTHON
from fastgeo.values import forms, same

# --- Elementwise ----------------------------------------------------------------------------------


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
        axes.append(replaced(input.axes, dim, fixed(own.shape[dim], "their order counts")))
    return axes[0] if isinstance(out, Tensor) else axes


def _normalize(out, input, p=2.0, dim=1, eps=1e-12):
    return list(input.axes)


def _glu(out, input, dim=-1):
    halves = cut(input.axes[dim], [out.shape[dim]] * 2, "it is cut across its parts")
    unify_all(halves[:1], halves[1:])
    return replaced(input.axes, dim, halves[0])


# --- Table ---------------------------------------------------------------------------------------

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
    | forms("sum mean amax amin logsumexp prod any all".split(), same(_reduction))
    | forms(["norm"], same(_norm))
    | forms(["var", "std"], same(_variance))
    | forms(["max", "min"], same(_extreme))
    | forms(["softmax", "log_softmax", "softmin"], same(_along))
    | forms("argsort cumprod cumsum flip logcumsumexp sort".split(), same(_in_order))
    | forms(["normalize"], same(_normalize))
    | forms(["glu"], same(_glu))
    | {operator.matmul: _matmul}
)
