"""Stacked forms of arithmetic and shapes, where torch's batching rules would not do.

Each takes N and what the function takes, with `Stacked` values among it; which function has which
form stands in `fastgeo.operations`. What has none runs by a batching rule (`batched`).
"""

import functools
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_linear
from torch import Tensor

from fastgeo.forward.standin import mapped
from fastgeo.stacking import fusion, products
from fastgeo.stacking.stacked import (
    NoForm,
    Stacked,
    aligned,
    any_stacked,
    batched,
    each,
    part,
    rank_of,
    strides_of_one,
)

# --- Elementwise ----------------------------------------------------------------------------------


def elementwise(function: Callable, n: int, *args: Any, **kwargs: Any) -> Stacked:
    if (out := products.with_function(function, args, kwargs)) is not None:
        return out
    rank = max(map(rank_of, (*args, *kwargs.values())))
    own = (aligned(arg, rank) for arg in scalars_as(args, rank))
    if kwargs:
        kwargs = {name: aligned(value, rank) for name, value in kwargs.items()}
    return Stacked(function(*own, **kwargs))


def add(function: Callable, n: int, input: Any, other: Any, **kwargs: Any) -> Stacked:
    joined = None if kwargs else fusion.with_sum(input, other)
    return elementwise(function, n, input, other, **kwargs) if joined is None else joined


def relu(function: Callable, n: int, input: Any, **kwargs: Any) -> Stacked:
    joined = fusion.with_relu(input)
    return elementwise(function, n, input, **kwargs) if joined is None else joined


def scalars_as(values: Sequence[Any], rank: int) -> Sequence[Any]:
    """The values, a network's scalars in the type of the rest, which they do not decide; as
    [N, 1, ...] they would. Where all are scalars, those that are shared decide it as well."""
    scalar = [isinstance(v, Stacked) and not rank_of(v) for v in values]
    if not any(scalar):
        return values
    if not rank:
        return [
            v[None] if isinstance(v, Tensor) and not s else v
            for v, s in zip(values, scalar, strict=True)
        ]
    rest = [v for v, s in zip(values, scalar, strict=True) if not s]
    types = [v.tensor.dtype if isinstance(v, Stacked) else v.dtype for v in rest if rank_of(v)]
    dtype = functools.reduce(torch.promote_types, types)

    def fitted(v: Stacked) -> Stacked:
        return Stacked(v.tensor.to(dtype)) if _kind(v.tensor.dtype) <= _kind(dtype) else v

    return [fitted(v) if s else v for v, s in zip(values, scalar, strict=True)]


def _kind(dtype: torch.dtype) -> int:
    """Of numbers: bool, integers, floating point, complex. A higher one decides the type."""
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else int(dtype != torch.bool)


def data(n, input):
    return Stacked(input.tensor.data)


def whole(function: Callable, n: int, *args: Any, **kwargs: Any) -> Any:
    """By a batching rule that wants all tensors to be those of N networks."""
    own = lambda t: t if isinstance(t, Stacked) else Stacked(each(t, n))  # noqa: E731
    args, kwargs = mapped(own, (args, kwargs))
    return batched(function, n, *args, **kwargs)


def alike(function: Callable, n: int, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What takes a shape and a type only, and so is one value for all networks."""
    if any_stacked((*args, *kwargs.values())):
        return batched(function, n, input, *args, **kwargs)
    with torch._C.DisableTorchFunctionSubclass():
        one = torch.empty((), dtype=input.dtype, device=input.device).expand(input.shape)
    return function(one, *args, **kwargs)


def dropout(n, input, p=0.5, training=True, inplace=False):
    return Stacked(F.dropout(each(input, n), p)) if training else input


def masked_fill(function: Callable, n: int, input: Any, mask: Any, value: Any) -> Stacked:
    """Before torch 2.12 its batching rule takes no number of each network's own."""
    if isinstance(value, Stacked):
        return elementwise(torch.where, n, mask, value, input)
    return elementwise(function, n, input, mask, value)


def count_nonzero(n, input, dim=None):
    """It has no batching rule before torch 2.12."""
    return batched(torch.sum, n, Stacked(input.tensor != 0), dim)


def matmul(n, input, other):
    if rank_of(other) == 1:
        return Stacked(matmul(n, input, Stacked(each(other, n)[..., None])).tensor.squeeze(-1))
    if rank_of(input) == 1:
        return Stacked(matmul(n, Stacked(each(input, n)[:, None]), other).tensor.squeeze(-2))
    if rank_of(other) == 2:
        if isinstance(other, Stacked):
            if (out := products.waiting(input, Stacked(other.tensor.mT))) is not None:
                return out
        return Stacked(stacked_linear(each(input, n), each(other, n).mT))
    rank = max(rank_of(input), rank_of(other))
    return Stacked(torch.matmul(aligned(input, rank), aligned(other, rank)))


def addmm(n, input, mat1, mat2, *, beta=1, alpha=1):
    if not rank_of(input) == beta == alpha == 1:
        return batched(torch.addmm, n, input, mat1, mat2, beta=beta, alpha=alpha)
    return Stacked(stacked_linear(each(mat1, n), each(mat2, n).mT, each(input, n)))


# --- Shapes ---------------------------------------------------------------------------------------


def of_one(t: Tensor) -> Tensor:
    """A network's own value of [N, ...], as it would lie in memory by itself; without numbers."""
    return torch.empty_strided(t.shape[1:], strides_of_one(t), dtype=t.dtype, device="meta")


def regrouped(function: Callable, n: int, input: Any, *args: Any, **kwargs: Any) -> Any:
    """view, flatten, ...: a view, or a copy where N lies between the axes of a network."""
    args, kwargs = mapped(  # of view_as only the shape counts
        lambda t: of_one(t.tensor) if isinstance(t, Stacked) else t, (args, kwargs)
    )
    if not isinstance(input, Stacked):
        return function(input, *args, **kwargs)
    t, sizes = input.tensor, args
    if function not in VIEWS or kwargs or not all(type(size) is int for size in args):
        if t.is_contiguous():
            return batched(function, n, input, *args, **kwargs)
        sizes = _regrouped_one(function, t, args, kwargs).shape
    out = Stacked(t.reshape(n, *sizes))
    if out.tensor.data_ptr() != t.data_ptr():
        one = _regrouped_one(function, t, args, kwargs)
        if one._base is not None:
            part((input, out))  # which are one memory in a network
    return out


VIEWS = (Tensor.view, Tensor.reshape)


def _regrouped_one(function: Callable, t: Tensor, args: tuple, kwargs: dict) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        one = function(of_one(t), *args, **kwargs)
    if one.dtype != t.dtype:
        raise NoForm("it is another dtype's view")
    return one


def transpose(n, input, dim0, dim1):
    t = input.tensor
    if not all(-t.ndim < dim < t.ndim - 1 for dim in (dim0, dim1)):
        raise IndexError(f"Dimension out of range (of {t.ndim - 1} axes, got {dim0} and {dim1})")
    return Stacked(t.transpose(dim0 + (dim0 >= 0), dim1 + (dim1 >= 0)))


def permute(function: Callable, n: int, input: Stacked, *dims: Any, **named: Any) -> Stacked:
    out = fusion.with_permutation(input, named.get("dims", dims))
    return batched(function, n, input, *dims, **named) if out is None else out


def cat(n, tensors, dim=0, *, axis=None):
    rank = max(map(rank_of, tensors))
    parts = [each(t, n) for t in tensors]
    if rank > 1:  # torch ignores an empty one of one axis, as a cache begins with
        parts = [t[0] if t.ndim == 2 and not t.numel() else t for t in parts]
    return Stacked(torch.cat(parts, (dim if axis is None else axis) % rank + 1))


def to(function: Callable, n: int, input: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = mapped(lambda t: t.tensor if isinstance(t, Stacked) else t, (args, kwargs))
    if not isinstance(input, Stacked):
        return function(input, *args, **kwargs)
    if kwargs.pop("memory_format", torch.preserve_format) is not torch.preserve_format:
        part(input)  # as in `contiguous`
    if function is Tensor.to:
        if (out := products.with_function(function, (input, *args), kwargs)) is not None:
            return out
    made = function(input.tensor, *args, **kwargs)
    return input if made is input.tensor else mapped(Stacked, made)


def contiguous(n, input, memory_format=torch.contiguous_format):
    if isinstance(input.waiting, products.Product):  # whose value lies in its order
        return input
    t = input.tensor
    if of_one(t).is_contiguous(memory_format=memory_format):
        return input
    if memory_format is torch.contiguous_format:
        return Stacked(t.contiguous())
    part(input)  # the layout of images is the engine's: no copy
    return Stacked(t)


def place(function: Callable, n: int, input: Stacked, dim: Any = None, keepdim: bool = False):
    """argmax and argmin, whose batching rules have another shape where all axes are kept."""
    if dim is not None:
        return batched(function, n, input, dim, keepdim)
    out = function(input.tensor.flatten(1) if rank_of(input) else input.tensor[:, None], 1)
    return Stacked(out.view(n, *(1,) * (keepdim and rank_of(input))))


# --- Indices --------------------------------------------------------------------------------------


def get_item(n, input, index):
    items = index if isinstance(index, tuple) else (index,)
    others = [one for one in items if not _is_basic(one)]
    if not others:
        return Stacked(input.tensor[(slice(None), *items)])
    own = [one for one in others if isinstance(one, Stacked)]
    if any(one.tensor.dtype in MASKS for one in own):
        raise NoForm("its mask differs between the networks")
    if all(map(rank_of, own)):
        return batched(Tensor.__getitem__, n, input, index)
    if len(others) > 1:  # where it is a view in one network, and vmap counts the axes of all
        raise NoForm("an integer beside other indices differs between the networks")
    out = batched(Tensor.__getitem__, n, input, index)
    part((input, out))
    return out


MASKS = (torch.bool, torch.uint8)


def _is_basic(one: Any) -> bool:
    """Whether it takes a view: an integer, a slice, None or an ellipsis."""
    return one is None or one is ... or type(one) in (int, slice)


def set_item(n: int, input: Stacked, index: Any, value: Any) -> None:
    """input[index] = value of each network."""
    items, t = index if isinstance(index, tuple) else (index,), input.tensor
    if all(map(_is_basic, items)):
        t[(slice(None), *items)] = _written(value, t[(slice(None), *items)].ndim - 1)
    elif isinstance(index, Stacked) and index.tensor.dtype is torch.bool and not rank_of(value):
        mask = index.tensor.reshape(*index.tensor.shape, *(1,) * (rank_of(input) - rank_of(index)))
        t.copy_(torch.where(mask, aligned(value, rank_of(input)), t))
    else:
        _put(n, input, index, value)


def index_put(n, input, indices, values, accumulate=False):
    out = Stacked(each(input, n).clone())
    index = tuple(slice(None) if one is None else one for one in indices)
    _put(n, out, index, values, accumulate)
    return out


def _put(n: int, input: Stacked, index: Any, value: Any, accumulate: bool = False) -> None:
    """By the places, in a network's flat value, of what is indexed."""
    t = input.tensor
    own = torch.arange(prod(t.shape[1:]), device=t.device).view(t.shape[1:])
    places = each(get_item(n, Stacked(own.expand(n, *own.shape)), index), n)
    value = value if isinstance(value, Tensor) else torch.as_tensor(value, device=t.device)
    value = _written(value, places.ndim - 1).to(t.dtype).expand(places.shape)
    put = torch.scatter_add if accumulate else torch.scatter
    t.copy_(put(t.flatten(1), 1, places.flatten(1), value.flatten(1)).view(t.shape))


def _written(value: Any, rank: int) -> Any:
    """What is written to a place of some rank, to broadcast to that of all networks."""
    if rank_of(value) > rank:
        raise NoForm("a value has more axes than its place")
    return aligned(value, rank)
