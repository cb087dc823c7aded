"""Operations on stacked values: arithmetic, shapes and reductions.

`FUNCTIONS` holds them under the function, or the name of the tensor method, that a graph calls.
Each takes N and what the function takes, with `Stacked` values among it.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_linear

from fastgeo.values import Stacked, aligned, by_vmap, each, forms, rank_of, same

# --- Elementwise ----------------------------------------------------------------------------------


def _elementwise(function: Callable) -> Callable:
    def stacked(n: int, *args: Any, inplace: bool = False, **kwargs: Any) -> Stacked:
        rank = max(map(rank_of, (*args, *kwargs.values())))
        args = [aligned(arg, rank) for arg in args]
        kwargs = {name: aligned(value, rank) for name, value in kwargs.items()}
        return Stacked(function(*args, **kwargs))

    return stacked


def _dropout(n, input, p=0.5, training=True, inplace=False):
    return Stacked(F.dropout(each(input, n), p)) if training else input


def _matmul(n, input, other):
    if rank_of(input) < 2 or rank_of(other) < 2:
        return by_vmap(torch.matmul, (input, other), {}, n)
    if rank_of(other) == 2:
        return Stacked(stacked_linear(each(input, n), each(other, n).mT))
    rank = max(rank_of(input), rank_of(other))
    return Stacked(torch.matmul(aligned(input, rank), aligned(other, rank)))


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


def _cat(n, tensors, dim=0):
    return Stacked(torch.cat([each(t, n) for t in tensors], _behind_n(dim)))


def _stack(n, tensors, dim=0):
    return Stacked(torch.stack([each(t, n) for t in tensors], _behind_n(dim)))


def _chunk(n, input, chunks, dim=0):
    return tuple(map(Stacked, input.tensor.chunk(chunks, _behind_n(dim))))


def _split(n, tensor, split_size_or_sections, dim=0):
    return tuple(map(Stacked, tensor.tensor.split(split_size_or_sections, _behind_n(dim))))


def _getitem(n, input, index):
    if not isinstance(input, Stacked):
        return input[index]  # of a tuple
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
        return by_vmap(operator.getitem, (input, index), {}, n)
    return Stacked(input.tensor[:, *index])


def _size(n, input, dim=None):
    shape = input.tensor.shape[1:]
    return shape if dim is None else shape[dim]


def _dim(n, input):
    return rank_of(input)


def _getattr(n, input, name):
    if name in ("device", "dtype"):
        return getattr(input.tensor, name)
    if name == "ndim":
        return rank_of(input)
    return _size(n, input) if name == "shape" else by_vmap(getattr, (input, name), {}, n)


def _to(n, input, *args, **kwargs):
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


def _along(function: Callable) -> Callable:
    def stacked(n, input, dim, _stacklevel=3, dtype=None):
        return Stacked(function(input.tensor, dim=_behind_n(dim), dtype=dtype))

    return stacked


# --- Tables ---------------------------------------------------------------------------------------

_ELEMENTWISE = """
    abs add addcdiv addcmul bfloat16 ceil celu clamp clone cos detach div double elu eq erf
    exp expm1 float floor ge gelu gt half hardsigmoid hardswish hardtanh isinf isnan le
    leaky_relu log log1p log2 logical_and logical_not logical_or logsigmoid lt masked_fill
    maximum minimum mish mul ne neg pow reciprocal relu relu6 round rsqrt selu sigmoid sign
    silu sin softplus softsign sqrt square sub tanh tanhshrink threshold true_divide where
""".split()
_PYTHON = "abs add and_ eq ge gt invert le lt mul ne neg or_ pow sub truediv".split()


FUNCTIONS: dict[Callable | str, Callable] = (
    {function: _elementwise(function) for function in (getattr(operator, n) for n in _PYTHON)}
    | forms(_ELEMENTWISE, _elementwise)
    | forms(["sum", "mean", "amax", "amin"], _reduction)
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
    | forms(["cat", "concat"], same(_cat))
    | forms(["stack"], same(_stack))
    | forms(["to", "type_as"], same(_to))
    | forms(["chunk"], same(_chunk))
    | forms(["split"], same(_split))
    | forms(["contiguous"], same(_contiguous))
    | forms(["size"], same(_size))
    | forms(["dim"], same(_dim))
    | forms(["matmul", "bmm"], same(_matmul))
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
        multinomial normal poisson rand rand_like randint randint_like randn randn_like rrelu
        """.split(),
        same(lambda: None),
    )
)
