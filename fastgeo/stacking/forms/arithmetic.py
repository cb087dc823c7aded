"""Stacked forms of arithmetic, shapes and reductions.

Each takes N and what the function takes, with `Stacked` values among it; which function has which
form stands in `fastgeo.operations`.
"""

import functools
import string
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_linear
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgeo.stacking import fusion
from fastgeo.stacking.values import (
    NoForm,
    Stacked,
    aligned,
    any_stacked,
    by_loop,
    each,
    rank_of,
    strides_of_one,
)

# --- Elementwise ----------------------------------------------------------------------------------


def elementwise(function: Callable, n: int, *args: Any, **kwargs: Any) -> Stacked:
    rank = max(map(rank_of, (*args, *kwargs.values())))
    args = [aligned(arg, rank) for arg in scalars_as(args, rank)]
    if kwargs:
        kwargs = {name: aligned(value, rank) for name, value in kwargs.items()}
    return Stacked(function(*args, **kwargs))


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


def alike(function: Callable) -> Callable:
    """What takes a shape and a type only, and so is one value for all networks."""

    def stacked(n, input, *args, **kwargs):
        if any_stacked((*args, *kwargs.values())):
            raise NoForm("the number that fills it differs between the networks")
        with torch._C.DisableTorchFunctionSubclass():
            one = torch.empty((), dtype=input.dtype, device=input.device).expand(input.shape)
        return function(one, *args, **kwargs)

    return stacked


def one_hot(n, input, num_classes=-1):
    if num_classes < 0:
        raise NoForm("its number of classes depends on its values", by_loop)
    return Stacked(F.one_hot(input.tensor, num_classes))


def dropout(n, input, p=0.5, training=True, inplace=False):
    return Stacked(F.dropout(each(input, n), p)) if training else input


def dropout_of(function: Callable) -> Callable | None:
    """Of whole channels, or with other numbers than zeros; None for what calls one of these."""

    def stacked(n, input, p, train):
        return samplewise(function)(n, input, p, train) if train else input

    return None if hasattr(function, "__code__") else stacked


def samplewise(function: Callable) -> Callable:
    """What treats every one of a batch alike, which is its input's first axis."""

    def stacked(n, input, *args, **kwargs):
        out = function(each(input, n).flatten(0, 1), *args, **kwargs)
        return Stacked(out.unflatten(0, (n, -1)))

    return stacked


def matmul(n, input, other):
    if rank_of(other) == 1:
        return Stacked(matmul(n, input, Stacked(each(other, n)[..., None])).tensor.squeeze(-1))
    if rank_of(input) == 1:
        return Stacked(matmul(n, Stacked(each(input, n)[:, None]), other).tensor.squeeze(-2))
    if rank_of(other) == 2:
        return Stacked(stacked_linear(each(input, n), each(other, n).mT))
    rank = max(rank_of(input), rank_of(other))
    return Stacked(torch.matmul(aligned(input, rank), aligned(other, rank)))


def plus_product(function: Callable) -> Callable:
    """addmm and the like: beta * input + alpha * (a @ b)."""

    def stacked(n, input, *factors, beta=1, alpha=1, **named):
        a, b = *factors, *(named[name] for name in sorted(named))
        if function.__name__ == "addmm" and rank_of(input) == beta == alpha == 1:
            return Stacked(stacked_linear(each(a, n), each(b, n).mT, each(input, n)))
        product = matmul(n, a, b)
        if function.__name__ == "addbmm":
            product = Stacked(product.tensor.sum(1))
        if alpha != 1:
            product = Stacked(product.tensor * alpha)
        return elementwise(torch.add, n, product, input, alpha=beta) if beta else product

    return stacked


def outer(n, input, vec2):
    return Stacked(each(input, n)[:, :, None] * each(vec2, n)[:, None])


def einsum(n, equation, *operands):
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


def behind_n(dim: int | Sequence[int], rank: int) -> int | tuple[int, ...]:
    """An axis, or several, of a network's own value with `rank` of them as one of [N, ...]."""
    if not rank or dim is None or dim == () or dim == []:
        raise NoForm("its axis is not given" if rank else "its input has no axes")
    if not isinstance(dim, int):
        return tuple(behind_n(one, rank) for one in dim)
    if not -rank <= dim < rank:
        raise IndexError(f"Dimension out of range (of {rank} axes, but got {dim})")
    return dim % rank + 1


def sizes_in(sizes: tuple) -> tuple[int, ...]:
    """The sizes of view(2, 3) and of view((2, 3))."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def regrouped(t: Tensor, shape: Sequence[int]) -> Stacked:
    """A view of [N, ...], or a copy where N lies between the axes of a network."""
    out = t.reshape(len(t), *shape)
    if out.data_ptr() != t.data_ptr() and _is_view(of_one(t), shape):
        for tensor in (t, out):  # which are one memory in a network
            tensor.untyped_storage().parted = True
    return Stacked(out)


def of_one(t: Tensor) -> Tensor:
    """A network's own value of [N, ...], as it would lie in memory by itself; without numbers."""
    return torch.empty_strided(t.shape[1:], strides_of_one(t), device="meta")


def _is_view(t: Tensor, shape: Sequence[int]) -> bool:
    try:
        t.view(*shape)
    except RuntimeError:
        return False
    return True


def reshape(n, input, *shape, **named):
    if isinstance(input, Stacked):
        return regrouped(input.tensor, sizes_in(shape) or named["shape"])
    raise NoForm("its sizes differ between the networks")


def view(n, input, *shape, **named):
    if shape and isinstance(shape[0], torch.dtype):
        raise NoForm("it is another dtype's view")
    return reshape(n, input, *shape, **named)


def flatten(n, input, start_dim=0, end_dim=-1):
    shape = input.tensor.shape
    if len(shape) == 1:
        return regrouped(input.tensor, [1])
    start, end = behind_n((start_dim, end_dim), len(shape) - 1)
    flat = prod(shape[start : end + 1])
    return regrouped(input.tensor, [*shape[1:start], flat, *shape[end + 1 :]])


def permute(n, input, *dims, **named):
    dims = sizes_in(dims) or named["dims"]
    dims = behind_n(dims, rank_of(input))
    joined = fusion.with_permutation(input, [dim - 1 for dim in dims])
    return Stacked(input.tensor.permute(0, *dims)) if joined is None else joined


def transpose(n, input, dim0, dim1):
    return Stacked(input.tensor.transpose(*behind_n((dim0, dim1), rank_of(input))))


def turned(n, input):
    """x.T and x.t(), whose axes are in reverse."""
    return Stacked(input.tensor.permute(0, *range(rank_of(input), 0, -1)))


def transposed(n, input):
    """x.mT."""
    return transpose(n, input, -1, -2)


def data(n, input):
    return Stacked(input.tensor.data)


def movedim(n, input, source, destination):
    rank = rank_of(input)
    return Stacked(input.tensor.movedim(behind_n(source, rank), behind_n(destination, rank)))


def unsqueeze(n, input, dim):
    return Stacked(input.tensor.unsqueeze(behind_n(dim, rank_of(input) + 1)))


def squeeze(n, input, dim=None):
    if dim is None:
        shape = [size for size in input.tensor.shape[1:] if size != 1]
        return Stacked(input.tensor.view(n, *shape))
    return Stacked(input.tensor.squeeze(behind_n(dim, rank_of(input))))


def unflatten(n, input, dim, sizes):
    shape, place = input.tensor.shape, behind_n(dim, rank_of(input))
    with torch._C.DisableTorchFunctionSubclass():
        own = torch.empty(shape[place], device="meta").unflatten(0, sizes).shape
    return regrouped(input.tensor, [*shape[1:place], *own, *shape[place + 1 :]])


def repeat(n, input, *repeats, **named):
    repeats = sizes_in((*repeats, *named.values()))
    repeats = (1,) * (rank_of(input) - len(repeats)) + repeats  # tile(2) of a matrix
    return Stacked(aligned(input, len(repeats)).repeat(1, *repeats))


def repeat_interleave(n, input, repeats=None, dim=None, *, output_size=None):
    if repeats is None or isinstance(repeats, Stacked):
        raise NoForm("how often it repeats differs between the networks", by_loop)
    t = input.tensor.reshape(n, -1) if dim is None else input.tensor
    dim = 1 if dim is None else behind_n(dim, rank_of(input))
    return Stacked(torch.repeat_interleave(t, repeats, dim, output_size=output_size))


def expand(n, input, *sizes, **named):
    sizes = sizes_in(sizes) or named["size"]
    return Stacked(aligned(input, len(sizes)).expand(n, *sizes))


def like(handler: Callable) -> Callable:
    """The shape of another value in place of sizes."""

    def stacked(n, input, other):
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(other.shape)
        if not isinstance(input, Stacked):
            return input.expand(shape) if handler is expand else input.reshape(shape)
        return handler(n, input, *shape)

    return stacked


def cat(n, tensors, dim=0, *, axis=None):
    rank = max(map(rank_of, tensors))
    parts = [each(t, n) for t in tensors]
    if rank > 1:  # torch ignores an empty one of one axis, as a cache begins with
        parts = [t[0] if t.ndim == 2 and not t.numel() else t for t in parts]
    return Stacked(torch.cat(parts, behind_n(dim if axis is None else axis, rank)))


def stack(n, tensors, dim=0):
    dim = behind_n(dim, rank_of(tensors[0]) + 1)
    return Stacked(torch.stack([each(t, n) for t in tensors], dim))


def hsplit(n, input, indices_or_sections):
    split = torch.dsplit if rank_of(input) > 1 else torch.hsplit
    return tuple(map(Stacked, split(input.tensor, indices_or_sections)))


def diagonal(n, input, offset=0, dim1=0, dim2=1):
    return Stacked(input.tensor.diagonal(offset, *behind_n((dim1, dim2), rank_of(input))))


def over_last(function: Callable, axes: int = 2) -> Callable:
    """What treats all axes but the last few as a batch's."""

    def stacked(n, input, *args, **kwargs):
        if rank_of(input) < axes:
            raise NoForm(f"its input has fewer than {axes} axes")
        return Stacked(function(input.tensor, *args, **kwargs))

    return stacked


def to(function: Callable) -> Callable:
    def stacked(n, input, *args, **kwargs):
        args, kwargs = pytree.tree_map_only(Stacked, lambda t: t.tensor, (args, kwargs))
        if not isinstance(input, Stacked):
            return function(input, *args, **kwargs)
        if kwargs.pop("memory_format", torch.preserve_format) is not torch.preserve_format:
            input.tensor.untyped_storage().parted = True  # as in `contiguous`
        made = function(input.tensor, *args, **kwargs)
        return input if made is input.tensor else pytree.tree_map_only(Tensor, Stacked, made)

    return stacked


def contiguous(n, input, memory_format=torch.contiguous_format):
    t = input.tensor
    if of_one(t).is_contiguous(memory_format=memory_format):
        return input
    if memory_format is torch.contiguous_format:
        return Stacked(t.contiguous())
    t.untyped_storage().parted = True  # the layout of images is the engine's: no copy
    return Stacked(t)


# --- Along an axis --------------------------------------------------------------------------------


AXES = ("dim", "dims", "axis", "dimension")


def along(function: Callable, at: int = 0, default: int | None = None) -> Callable:
    """What works along one axis or several, given `at` places behind its input; other tensors among
    its arguments have as many axes as that, as in gather."""

    def stacked(n, input, *args, **kwargs):
        rank = rank_of(input)
        name = next((name for name in AXES if name in kwargs), "dim")
        if name not in kwargs and len(args) > at:
            args = (*args[:at], behind_n(args[at], rank), *args[at + 1 :])
        else:
            kwargs[name] = behind_n(kwargs.get(name, default), rank)
        kwargs = dict(zip(kwargs, with_n(kwargs.values(), n, rank), strict=True))
        out = function(each(input, n), *with_n(args, n, rank), **kwargs)
        return Stacked(out) if isinstance(out, Tensor) else type(out)([*map(Stacked, out)])

    return stacked


def with_n(values: Iterable, n: int, rank: int) -> list:
    """Arguments with N in front of each tensor; these are to have as many axes as the input."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if any(rank_of(tensor) != rank for tensor in tensors):
        raise NoForm("its tensors have different numbers of axes")
    return [each(value, n) if isinstance(value, Tensor) else value for value in values]


def reduction(function: Callable, at: int = 0, several: bool = True) -> Callable:
    """What `along` is for, of all axes where none is given; several: whether it takes as many."""

    def stacked(n, input, *args, **kwargs):
        if len(args) > at and isinstance(args[at], bool):  # var(x, False)
            kwargs["unbiased"], args = args[at], args[:at]
        if (args[at] if len(args) > at else kwargs.get("dim", kwargs.get("axis"))) is not None:
            return along(function, at)(n, input, *args, **kwargs)
        rank, kept = rank_of(input), input
        every = tuple(range(rank))
        if not (several and rank):
            kept, every = Stacked(input.tensor.reshape(n, -1)), 0
        if len(args) > at:
            args = (*args[:at], every, *args[at + 1 :])
        else:
            kwargs = {name: value for name, value in kwargs.items() if name != "axis"}
            kwargs["dim"] = every
        out = along(function, at)(n, kept, *args, **kwargs)
        if kept is input:
            return out
        ones = lambda t: (1,) * rank if t.ndim > 1 else ()  # noqa: E731 - where axes are kept
        return pytree.tree_map(lambda one: Stacked(one.tensor.view(n, *ones(one.tensor))), out)

    return stacked


def norm(function: Callable) -> Callable | None:
    """Of torch.linalg.norm; None for torch.norm, which calls others."""

    def stacked(n, input, ord=None, dim=None, keepdim=False, *, dtype=None):
        options = dict(keepdim=keepdim, dtype=dtype)
        if dim is None and (ord is None or rank_of(input) != 2):
            of_all = reduction(torch.linalg.vector_norm, 1)
            return of_all(n, input, 2 if ord is None else ord, **options)
        return along(function, 1)(n, input, ord, (0, 1) if dim is None else dim, **options)

    return stacked if function is torch.linalg.norm else None


def windows(function: Callable) -> Callable | None:
    """Of x.unfold; None for F.unfold, which calls others."""
    return along(function) if function is Tensor.unfold else None


def extreme(elementwise_: Callable, all_of: Callable) -> Callable:
    def made(function: Callable) -> Callable:
        def stacked(n, input, dim=None, keepdim=False, *, other=None):
            other = dim if isinstance(dim, Tensor) else other
            if other is not None:  # max(a, b)
                return elementwise(elementwise_, n, input, other)
            if dim is None:
                return reduction(all_of)(n, input)
            return along(function)(n, input, dim, keepdim)

        return stacked

    return made


def flip(n, input, *dims, **named):
    dims = sizes_in((*dims, *named.values()))
    return Stacked(input.tensor.flip(behind_n(dims, rank_of(input))))
