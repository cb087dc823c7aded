"""Stacked forms of what reads and writes at indices; see `fastgeo.stacking.forms.arithmetic`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastgeo.stacking.forms.arithmetic import behind_n, with_n
from fastgeo.stacking.values import NoForm, Stacked, aligned, any_stacked, by_loop, each, rank_of

MASKS = (torch.bool, torch.uint8)


def get_item(n, input, index):
    index = _items(index)
    if isinstance(input, Stacked) and not _by_network(index):
        return Stacked(input.tensor[(slice(None), *index)])
    view, places, axes = _indexed(n, input, index)
    out = view[places].movedim(tuple(range(1, 1 + len(axes))), axes)
    if not axes:  # a view of each network's value
        for tensor in (view, out):
            tensor.untyped_storage().parted = True
    return Stacked(out)


def set_item(n: int, input: Stacked, index: Any, value: Any) -> str:
    """input[index] = value of each network; how that was done, "" if it was not."""
    index, t = _items(index), input.tensor
    mask = index[0].tensor if len(index) == 1 and isinstance(index[0], Stacked) else None
    try:
        if mask is not None and mask.dtype is torch.bool and not rank_of(value):
            mask = mask.reshape(*mask.shape, *(1,) * (t.ndim - mask.ndim))
            t.copy_(torch.where(mask, aligned(value, t.ndim - 1), t))
        elif _by_network(index) or (isinstance(value, Tensor) and not all(map(_is_basic, index))):
            _put(n, input, index, value)
        else:
            place = (slice(None), *index)
            t[place] = _written(value, t[place].ndim - 1)
    except NoForm:
        return ""
    return "stacked"


def index_put(n, input, indices, values, accumulate=False):
    out = Stacked(each(input, n).clone())
    _put(n, out, [slice(None) if one is None else one for one in indices], values, accumulate)
    return out


def _put(n: int, input: Stacked, index: Sequence, value: Any, accumulate: bool = False) -> None:
    view, places, axes = _indexed(n, input, index)
    if isinstance(value, Tensor):
        value = _written(Stacked(each(value, n)), view.ndim - len(places) + len(axes))
        value = value.movedim(axes, tuple(range(1, 1 + len(axes)))).to(view)
    else:
        value = torch.as_tensor(value, dtype=view.dtype, device=view.device)
    view.index_put_(places, value, accumulate)


def _written(value: Any, rank: int) -> Any:
    """What is written to a place of some rank, to broadcast to that of all networks."""
    if rank_of(value) > rank:
        raise NoForm("a value has more axes than its place")
    return aligned(value, rank)


def _items(index: Any) -> tuple:
    """What stands between brackets; an integer that is in a tensor as one, as torch reads it."""
    items = index if isinstance(index, tuple) else (index,)
    is_integer = lambda one: type(one) is Tensor and not one.ndim and one.dtype not in MASKS  # noqa: E731
    return tuple(int(one) if is_integer(one) else one for one in items)


def _is_basic(one: Any) -> bool:
    """Whether it takes a view: an integer, a slice, None or an ellipsis."""
    if one is None or one is ... or isinstance(one, slice):
        return True
    return hasattr(one, "__index__") and not hasattr(one, "__len__") and not isinstance(one, bool)


def _by_network(index: Sequence) -> bool:
    """Whether [:, *index] of [N, ...] is another value than that of each network: indices differ,
    or they are not side by side, so that the axes that they give would come before N."""
    places = [place for place, one in enumerate(index) if not _is_basic(one)]
    return any_stacked(index) or (len(places) > 1 and places[-1] - places[0] >= len(places))


def _indexed(
    n: int, input: Tensor, index: Sequence
) -> tuple[Tensor, tuple[Tensor, ...], tuple[int, ...]]:
    """For input[index] of each network: a view [N, ...], the integers that index its first axes, N
    among them, and the axes behind N that those give where the result is a network's own."""
    items = []
    for one in index:
        if not _is_basic(one):
            one = one if isinstance(one, Tensor) else torch.as_tensor(one)
            if one.dtype in MASKS:
                if isinstance(one, Stacked) or not one.ndim:
                    raise NoForm("its mask differs between the networks", by_loop)
                items += one.nonzero(as_tuple=True)
                continue
        items.append(one)
    rest = rank_of(input) - sum(one is not None and one is not ... for one in items)
    ellipsis = next((place for place, one in enumerate(items) if one is ...), len(items))
    items[ellipsis : ellipsis + 1] = [slice(None)] * rest
    integers = [one for one in items if isinstance(one, Tensor)]
    basic = [slice(None) if isinstance(one, Tensor) else one for one in items]
    kept = [one for one in items if one is None or isinstance(one, slice | Tensor)]
    axes = [axis for axis, one in enumerate(kept, 1) if isinstance(one, Tensor)]
    rank, first = max(map(rank_of, integers)), axes[0]
    if axes[-1] - first >= len(axes):
        if not all(map(rank_of, integers)):  # torch counts one integer as basic; vmap does not
            raise NoForm("its indices are not side by side", by_loop)
        first = 1
    view = each(input, n)[(slice(None), *basic)].movedim(axes, tuple(range(1, 1 + len(axes))))
    networks = torch.arange(n, device=view.device).view(-1, *(1,) * rank)
    places = (networks, *(aligned(one, rank) for one in integers))
    return view, places, tuple(range(first, first + rank))


BY_ROW = {
    "index_select": torch.gather,
    "index_add": torch.scatter_add,
    "index_copy": torch.scatter,
    "index_fill": torch.scatter,
}


def at_indices(function: Callable) -> Callable:
    """One of these, whose index has one axis."""

    def stacked(n, input, dim, index, *values, alpha=1, **named):
        t, dim = each(input, n), behind_n(dim, rank_of(input))
        values = with_n((*values, *named.values()), n, rank_of(input))
        if alpha != 1:
            values = (values[0] * alpha,)
        if not isinstance(index, Stacked):
            return Stacked(function(t, dim, index, *values))
        index = index.tensor.view(n, *(1,) * (dim - 1), -1, *(1,) * (t.ndim - dim - 1))
        index = index.expand(*t.shape[:dim], -1, *t.shape[dim + 1 :])
        return Stacked(BY_ROW[function.__name__](t, dim, index, *values))

    return stacked
