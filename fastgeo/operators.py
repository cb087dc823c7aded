"""Operations on stacked values: arithmetic, shapes and reductions.

`FUNCTIONS` holds them under the function, or the name of the tensor method, that a graph calls.
Each takes N and what the function takes, with `Stacked` values among it.
"""

import functools
import operator
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_linear
from torch.utils import _pytree as pytree

from fastgeo.values import NoForm, Stacked, aligned, any_stacked, each, forms, rank_of, same

# --- Elementwise ----------------------------------------------------------------------------------


def _elementwise(function: Callable) -> Callable:
    def stacked(n: int, *args: Any, inplace: bool = False, **kwargs: Any) -> Stacked:
        rank = max(map(rank_of, (*args, *kwargs.values())))
        args = _scalars_as(args, rank)
        args = [aligned(arg, rank) for arg in args]
        kwargs = {name: aligned(value, rank) for name, value in kwargs.items()}
        return Stacked(function(*args, **kwargs))

    return stacked


def _scalars_as(values: Sequence[Any], rank: int) -> Sequence[Any]:
    """The values, a network's scalars in the type of the rest, which they do not decide; as
    [N, 1, ...] they would."""
    scalar = [isinstance(v, Stacked) and v.tensor.ndim == 1 for v in values]
    if not rank or not any(scalar):
        return values
    rest = [
        v.tensor if isinstance(v, Stacked) else v
        for v, s in zip(values, scalar, strict=True)
        if not s
    ]
    types = [t.dtype for t in rest if torch.is_tensor(t) and t.ndim and t.is_floating_point()]
    if not types:
        return values
    dtype = functools.reduce(torch.promote_types, types)
    return [
        Stacked(v.tensor.to(dtype)) if s and v.tensor.is_floating_point() else v
        for v, s in zip(values, scalar, strict=True)
    ]


def _dropout(n, input, p=0.5, training=True, inplace=False):
    return Stacked(F.dropout(each(input, n), p)) if training else input


def _matmul(n, input, other):
    if rank_of(other) == 1:
        return Stacked(_matmul(n, input, Stacked(each(other, n)[..., None])).tensor.squeeze(-1))
    if rank_of(input) == 1:
        return Stacked(_matmul(n, Stacked(each(input, n)[:, None]), other).tensor.squeeze(-2))
    if rank_of(other) == 2:
        return Stacked(stacked_linear(each(input, n), each(other, n).mT))
    rank = max(rank_of(input), rank_of(other))
    return Stacked(torch.matmul(aligned(input, rank), aligned(other, rank)))


def _einsum(n, equation, *operands):
    if not isinstance(equation, str) or "->" not in equation:
        raise NoForm("its output is not given by letters")
    operands = operands[0] if isinstance(operands[0], list | tuple) else operands
    networks = next(letter for letter in string.ascii_letters if letter not in equation)
    axes, out = equation.replace(" ", "").split("->")
    axes = ",".join(
        networks + own if isinstance(operand, Stacked) else own
        for own, operand in zip(axes.split(","), operands, strict=True)
    )
    tensors = [t.tensor if isinstance(t, Stacked) else t for t in operands]
    return Stacked(torch.einsum(f"{axes}->{networks}{out}", *tensors))


# --- Shapes ---------------------------------------------------------------------------------------


def _behind_n(dim: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """A dimension, or several, of a network's own value as one of [N, ...]."""
    if isinstance(dim, tuple):
        return tuple(map(_behind_n, dim))
    return dim + 1 if dim >= 0 else dim


def _sizes(sizes: tuple) -> tuple[int, ...]:
    """The sizes of view(2, 3) and of view((2, 3))."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def _reshape(n, input, *shape):
    return Stacked(input.tensor.reshape(n, *_sizes(shape)))


def _flatten(n, input, start_dim=0, end_dim=-1):
    t = input.tensor
    if t.ndim == 1:
        return Stacked(t[:, None])
    return Stacked(t.flatten(_behind_n(start_dim), _behind_n(end_dim)))


def _permute(n, input, *dims):
    rank = rank_of(input)
    return Stacked(input.tensor.permute(0, *(dim % rank + 1 for dim in _sizes(dims))))


def _transpose(n, input, dim0, dim1):
    return Stacked(input.tensor.transpose(_behind_n(dim0), _behind_n(dim1)))


def _unsqueeze(n, input, dim):
    return Stacked(input.tensor.unsqueeze(_behind_n(dim)))


def _squeeze(n, input, dim):
    return Stacked(input.tensor.squeeze(_behind_n(dim)))


def _unflatten(n, input, dim, sizes):
    return Stacked(input.tensor.unflatten(_behind_n(dim), sizes))


def _repeat(n, input, *repeats):
    repeats = _sizes(repeats)
    return Stacked(aligned(input, len(repeats)).repeat(1, *repeats))


def _expand(n, input, *sizes):
    sizes = _sizes(sizes)
    return Stacked(aligned(input, len(sizes)).expand(n, *sizes))


def _like(handler: Callable, function: Callable) -> Callable:
    """The shape of another value in place of sizes."""

    def stacked(n, input, other):
        if not isinstance(input, Stacked):
            return function(input, _size(n, other))
        return handler(n, input, *_size(n, other))

    return stacked


def _cat(n, tensors, dim=0):
    return Stacked(torch.cat([each(t, n) for t in tensors], _behind_n(dim)))


def _stack(n, tensors, dim=0):
    return Stacked(torch.stack([each(t, n) for t in tensors], _behind_n(dim)))


def _chunk(n, input, chunks, dim=0):
    return tuple(map(Stacked, input.tensor.chunk(chunks, _behind_n(dim))))


def _split(n, tensor, split_size_or_sections, dim=0):
    return tuple(map(Stacked, tensor.tensor.split(split_size_or_sections, _behind_n(dim))))


def _getitem(n, input, index):
    if torch.is_tensor(input):
        raise NoForm("its index differs between the networks")
    if not isinstance(input, Stacked):
        return input[index]  # of a tuple
    index = index if isinstance(index, tuple) else (index,)
    if any_stacked(index):
        raise NoForm("its index differs between the networks")
    if any(isinstance(i, list | torch.Tensor) for i in index):
        places = [p for p, i in enumerate(index) if isinstance(i, int | list | torch.Tensor)]
        if places[-1] - places[0] >= len(places):  # the axes that they give would come before N
            raise NoForm("its indices are not side by side")
    return Stacked(input.tensor[:, *index])


def _size(n, input, dim=None):
    shape = input.tensor.shape[1:] if isinstance(input, Stacked) else input.shape
    return shape if dim is None else shape[dim]


def _dim(n, input):
    return rank_of(input)


def _getattr(n, input, name):
    if not isinstance(input, Stacked):
        return getattr(input, name)  # of a named tuple
    if name in ("device", "dtype"):
        return getattr(input.tensor, name)
    if name == "ndim":
        return rank_of(input)
    if name == "mT" or (name == "T" and rank_of(input) == 2):
        return Stacked(input.tensor.mT)
    if name == "shape":
        return _size(n, input)
    raise NoForm(f"{name} has no stacked form")


def _to(n, input, *args, **kwargs):
    if not isinstance(input, Stacked):
        raise NoForm("its input is one for all networks")
    args = [arg.tensor if isinstance(arg, Stacked) else arg for arg in args]
    return Stacked(input.tensor.to(*args, **kwargs))


def _contiguous(n, input, *args, **kwargs):
    return input  # `_reshape` copies where a view would need it


# --- Along an axis --------------------------------------------------------------------------------


def _reduction(function: Callable) -> Callable:
    def stacked(n, input, dim=None, keepdim=False):
        rank = rank_of(input)
        if rank == 0:
            return input
        dims = (dim,) if isinstance(dim, int) else dim or range(rank)
        return Stacked(function(input.tensor, [d % rank + 1 for d in dims], keepdim))

    return stacked


def _extreme(function: Callable, elementwise: Callable, reduction: Callable) -> Callable:
    def stacked(n, input, dim=None, keepdim=False):
        if dim is None:
            return _reduction(reduction)(n, input)
        if isinstance(dim, Stacked | torch.Tensor):  # max(a, b)
            return _elementwise(elementwise)(n, input, dim)
        return pytree.tree_map(Stacked, function(input.tensor, _behind_n(dim), keepdim))

    return stacked


def _along(function: Callable) -> Callable:
    def stacked(n, input, dim, *args, **kwargs):
        return Stacked(function(input.tensor, _behind_n(dim), *args, **kwargs))

    return stacked


# --- Tables ---------------------------------------------------------------------------------------

ELEMENTWISE = """
    abs add addcdiv addcmul bfloat16 ceil celu clamp clone cos detach div double elu eq erf
    exp expm1 float floor ge gelu gt half hardsigmoid hardswish hardtanh isinf isnan le
    leaky_relu log log1p log2 logical_and logical_not logical_or logsigmoid lt masked_fill
    maximum minimum mish mul ne neg pow reciprocal relu relu6 round rsqrt selu sigmoid sign
    silu sin softplus softsign sqrt square sub tanh tanhshrink threshold true_divide where
""".split()
PYTHON = "abs add and_ eq ge gt invert le lt mul ne neg or_ pow sub truediv".split()


FUNCTIONS: dict[Callable | str, Callable] = (
    {function: _elementwise(function) for function in (getattr(operator, n) for n in PYTHON)}
    | forms(ELEMENTWISE, _elementwise)
    | forms(["sum", "mean", "amax", "amin"], _reduction)
    | forms(["max"], same(_extreme(torch.max, torch.maximum, torch.amax)))
    | forms(["min"], same(_extreme(torch.min, torch.minimum, torch.amin)))
    | forms(["softmax", "log_softmax"], _along)
    | forms(["view", "reshape"], same(_reshape))
    | forms(["permute"], same(_permute))
    | forms(["transpose", "swapaxes"], same(_transpose))
    | forms(["flatten"], same(_flatten))
    | forms(["unsqueeze"], same(_unsqueeze))
    | forms(["squeeze"], same(_squeeze))
    | forms(["unflatten"], same(_unflatten))
    | forms(["repeat"], same(_repeat))
    | forms(["expand"], same(_expand))
    | forms(["expand_as"], same(_like(_expand, torch.Tensor.expand)))
    | forms(["view_as", "reshape_as"], same(_like(_reshape, torch.reshape)))
    | forms(["cat", "concat"], same(_cat))
    | forms(["stack"], same(_stack))
    | forms(["to", "type_as"], same(_to))
    | forms(["chunk"], same(_chunk))
    | forms(["split"], same(_split))
    | forms(["contiguous"], same(_contiguous))
    | forms(["size"], same(_size))
    | forms(["dim"], same(_dim))
    | forms(["matmul", "bmm", "mm", "mv"], same(_matmul))
    | forms(["einsum"], same(_einsum))
    | forms(["dropout"], same(_dropout))
    | {
        operator.getitem: _getitem,
        operator.matmul: _matmul,
        getattr: _getattr,
    }
)
# Drawn for each network by itself, also where nothing that they are given differs.
RANDOM = set(
    forms(
        """alpha_dropout bernoulli dropout dropout1d dropout2d dropout3d feature_alpha_dropout
        gumbel_softmax multinomial normal poisson rand rand_like randint randint_like randn
        randn_like randperm rrelu scaled_dot_product_attention
        """.split(),
        same(lambda: None),
    )
)
