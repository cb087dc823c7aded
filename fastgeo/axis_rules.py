"""How each operation carries the permutations of its inputs' axes to its output's.

`FUNCTIONS` holds a rule under the function, or the name of the tensor method, that a graph calls;
`MODULES` one for each layer that is one node, under its type. A rule takes the output and what the
function takes, with `Value`s for tensors, says which axes are permuted alike or not at all, and
returns the axes of the output. With its inputs permuted like that the operation gives its output,
permuted like that. An operation without a rule, or with arguments that its rule does not cover,
leaves all axes that it meets fixed.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
SPACE = "its positions are those of an image or a sequence"


def _fix(axes: Iterable[Axis], why: str) -> Axes:
    axes = list(axes)
    for axis in axes:
        fix(axis, why)
    return axes


def _unify(xs: Iterable[Axis], ys: Iterable[Axis]) -> None:
    for x, y in zip(xs, ys, strict=True):
        unify(x, y, "its structure differs between the tensors that meet here")


def values_in(tree: Any) -> list[Value]:
    """The values among arguments."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Value)]


# --- Elementwise ----------------------------------------------------------------------------------


def _joined(out: Tensor, values: Iterable[Any]) -> Axes:
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
                _unify([axes[-i]], [axis])
    sizes = zip(axes, out.shape, strict=True)
    return [fixed(size) if axis is None else axis for axis, size in sizes]


def _elementwise(out, *args, **kwargs):
    return _joined(out, values_in((args, kwargs)))


def _kept(out, input, *args, **kwargs):
    if out.shape != input.tensor.shape:
        raise NoRule("it changes the shape")
    return list(input.axes)


def _dropout(out, input, p=0.5, training=True, inplace=False):
    if training and p:
        raise NoRule("it draws random numbers")
    return list(input.axes)


def _prelu(out, input, weight):
    if weight.tensor.numel() > 1:
        _unify(input.axes[1:2], weight.axes)
    return list(input.axes)


# --- Products -------------------------------------------------------------------------------------


def _linear(out, input, weight, bias=None):
    _unify(input.axes[-1:], weight.axes[-1:])
    outer = list(weight.axes[:-1])
    if bias is not None:
        _unify(outer, bias.axes)
    return [*input.axes[:-1], *outer]


def _matmul(out, input, other):
    x, y = list(input.axes), list(other.axes)
    inner = y.pop(-2 if len(y) > 1 else 0)
    _unify([x.pop()], [inner])
    matrix = ([x.pop()] if x else []) + ([y.pop()] if y else [])
    batch = out.new_empty(out.shape[: out.ndim - len(matrix)], device="meta")
    return _joined(batch, [Value(None, tuple(x)), Value(None, tuple(y))]) + matrix


def _einsum(out, equation, *operands):
    operands = operands[0] if isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or "->" not in equation or "." in equation:
        raise NoRule("its axes are not all given by letters")
    inputs, result = equation.replace(" ", "").split("->")
    named: dict[str, Axis] = {}
    for letters, operand in zip(inputs.split(","), operands, strict=True):
        for letter, axis in zip(letters, operand.axes, strict=True):
            if axis.size > 1 or letter not in named:
                _unify([named.setdefault(letter, axis)], [axis])
    return [named[letter] for letter in result]


def _conv(spatial: int) -> Callable:
    def rule(out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        *batch, channels = input.axes[:-spatial]
        outer, inner, *kernel = weight.axes
        _fix([*input.axes[-spatial:], *kernel], SPACE)
        if groups > 1:
            why = f"the channels are not made of {groups} groups"
            group, channels = split(channels, [groups, inner.size], why)
            of_weight, _ = split(outer, [groups, outer.size // groups], why)
            _unify([group], [of_weight])
        _unify([channels], [inner])
        if bias is not None:
            _unify([outer], bias.axes)
        return [*batch, outer, *map(_space, out.shape[-spatial:])]

    return rule


def _conv_transpose(spatial: int) -> Callable:
    def rule(
        out,
        input,
        weight,
        bias=None,
        stride=1,
        padding=0,
        output_padding=0,
        groups=1,
        dilation=1,
    ):
        *batch, channels = input.axes[:-spatial]
        inner, outer, *kernel = weight.axes
        _fix([*input.axes[-spatial:], *kernel], SPACE)
        _unify([channels], [inner])
        if groups > 1:
            why = f"the channels are not made of {groups} groups"
            group, _ = split(inner, [groups, inner.size // groups], why)
            whole = Axis(groups * outer.size)
            _unify(split(whole, [groups, outer.size], why), [group, outer])
            outer = whole
        if bias is not None:
            _unify([outer], bias.axes)
        return [*batch, outer, *map(_space, out.shape[-spatial:])]

    return rule


def _embedding(
    out, input, weight, padding_idx=None, max_norm=None, *args, scale_grad_by_freq=False, **kwargs
):
    _fix(weight.axes[:1], "its rows are looked up by number")
    return [*input.axes, weight.axes[1]]


def _attention(
    out,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    q, k, v = (list(t.axes) for t in (query, key, value))
    if enable_gqa:  # neighbouring heads of queries share keys and values
        for t in (k, v):
            _unify(q[:-3], t[:-3])
            sizes = [t[-3].size, q[-3].size // t[-3].size]
            groups, _ = split(q[-3], sizes, "the heads of the queries are not made of groups")
            _unify([groups], [t[-3]])
        batch = q[:-2]
    else:
        shape = out.new_empty(out.shape[:-2], device="meta")
        batch = _joined(shape, [Value(None, tuple(t[:-2])) for t in (q, k, v)])
    _unify(q[-1:], k[-1:])
    _unify(k[-2:-1], v[-2:-1])
    if is_causal:
        _fix([q[-2], k[-2]], SPACE)
    if attn_mask is not None:
        scores = Value(None, (*batch, q[-2], k[-2]))
        shape = [axis.size for axis in scores.axes]
        _joined(torch.empty(shape, device="meta"), [scores, attn_mask])
    return [*batch, q[-2], v[-1]]


# --- Normalisation --------------------------------------------------------------------------------


def _layer_norm(out, input, normalized_shape, weight=None, bias=None, eps=None, *args):
    for own in (weight, bias):
        if own is not None:
            _unify(input.axes[-len(own.axes) :], own.axes)
    return list(input.axes)


def _group_norm(out, input, num_groups, weight=None, bias=None, *args, **kwargs):
    channels = input.axes[1]
    if num_groups > 1:
        sizes = [num_groups, channels.size // num_groups]
        split(channels, sizes, f"the channels are not made of {num_groups} groups")
    for own in (weight, bias):
        if own is not None:
            _unify([channels], own.axes)
    return list(input.axes)


def _channel_norm(out, input, *own, **kwargs):
    """Statistics, a weight and a bias for each channel."""
    for value in values_in((own, kwargs)):
        _unify(input.axes[1:2], value.axes)
    return list(input.axes)


# --- Space ----------------------------------------------------------------------------------------


def _space(size: int) -> Axis:
    return fixed(size, SPACE)


def _spatial(spatial: int | None = None) -> Callable:
    """Every channel treated alike, the axes behind the channels as space."""

    def rule(out, input, *args, **kwargs):
        outer = 2 if spatial is None else len(input.axes) - spatial
        _fix(input.axes[outer:], SPACE)
        outs = [out] if isinstance(out, Tensor) else out
        axes = [[*input.axes[:outer], *map(_space, own.shape[outer:])] for own in outs]
        return axes[0] if isinstance(out, Tensor) else axes

    return rule


def _pad(out, input, pad, mode="constant", value=None):
    axes = list(input.axes)
    for i, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        if not low and not high:
            continue
        if mode == "constant" and low >= 0 and high >= 0:  # equal numbers, in any order
            axes[-i] = concat([Axis(low), axes[-i], Axis(high)])
        else:
            fix(axes[-i], SPACE)
            axes[-i] = _space(out.shape[-i])
    return axes


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
                _unify([x], [y])
    axes = list(first.axes)
    axes[dim] = concat([t.axes[dim] for t in tensors])
    return axes


def _stack(out, tensors, dim=0):
    first, *others = tensors
    for other in others:
        _unify(first.axes, other.axes)
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
        joined = _joined(torch.empty(shape, device="meta"), advanced)
        axes[places[0] : places[0]] = joined
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


def _pixel_shuffle(out, input, upscale_factor):
    channels = input.axes[-3]
    sizes = [out.shape[-3], upscale_factor**2]
    channels, inner = split(channels, sizes, "its channels become pixels")
    fix(inner, "its channels become pixels")
    _fix(input.axes[-2:], SPACE)
    return [*input.axes[:-3], channels, *map(_space, out.shape[-2:])]


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
        return _joined(out, [input, dim])
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
    _unify(halves[:1], halves[1:])
    return _replaced(input.axes, dim, halves[0])


# --- Layers that are one node ---------------------------------------------------------------------


def _batch_norm(out, layer, state: Mapping[str, Value], input):
    for own in state.values():
        if own.axes:
            _unify(input.axes[1:2], own.axes)
    return list(input.axes)


def _multihead_attention(
    out,
    layer: nn.MultiheadAttention,
    state: Mapping[str, Value],
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    if layer.add_zero_attn or layer.bias_k is not None:
        raise NoRule("keys are added to those that are given")
    own = {name: value.axes for name, value in state.items()}
    embed, heads = layer.embed_dim, layer.num_heads
    why = f"it is not made of {heads} heads"
    if "in_proj_weight" in own:
        q, k, v = cut(own["in_proj_weight"][0], [embed] * 3, "it is not query, key and value")
        inner = [own["in_proj_weight"][1]] * 3
    else:
        weights = [own[f"{name}_proj_weight"] for name in "qkv"]
        (q, k, v), inner = ([axes[i] for axes in weights] for i in (0, 1))
    if "in_proj_bias" in own:
        _unify([concat([q, k, v])], own["in_proj_bias"])
    _unify(inner, [t.axes[-1] for t in (query, key, value)])
    sizes = [heads, embed // heads]
    (q_heads, _), (k_heads, _), (v_heads, _) = (split(t, sizes, why) for t in (q, k, v))
    _unify([q], [k])
    _unify([q_heads], [v_heads])
    _unify([v], [own["out_proj.weight"][1]])
    if "out_proj.bias" in own:
        _unify(own["out_proj.weight"][:1], own["out_proj.bias"])
    time = 0 if query.tensor.ndim == 2 or not layer.batch_first else 1
    batch = [query.axes[1 - time]] if query.tensor.ndim == 3 else []
    for other in (key, value):
        _unify(batch, [other.axes[1 - time]] if batch else [])
    target, source = query.axes[time], key.axes[time]
    _unify([source], [value.axes[time]])
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    if masks or is_causal:
        for mask in masks:
            _fix(mask.axes, SPACE)
        _fix([*batch, target, source], SPACE)
        if attn_mask is not None and attn_mask.tensor.ndim == 3:
            _fix([q_heads], "the mask differs between heads")
    axes = [*query.axes[:-1], own["out_proj.weight"][0]]
    if out[1] is None:
        return [axes, None]
    per_head = [] if average_attn_weights else [q_heads]
    return [axes, [*batch, *per_head, target, source]]


def _recurrent(out, layer: nn.RNNBase, state: Mapping[str, Value], input, hx=None):
    """Every gate of a layer has the hidden channels of that layer and direction."""
    if hx is not None or layer.proj_size:
        raise NoRule("its rule covers no initial state and no projection")
    own = {name: value.axes for name, value in state.items()}
    below, every = input.axes[-1], []
    for number in range(layer.num_layers):
        outer = []
        for suffix in ("", "_reverse") if layer.bidirectional else ("",):
            name = f"l{number}{suffix}"
            rows, hidden = own[f"weight_hh_{name}"]
            gates = concat([hidden] * (rows.size // hidden.size))
            _unify([own[f"weight_ih_{name}"][1]], [below])
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                if f"{kind}_{name}" in own:
                    _unify(own[f"{kind}_{name}"][:1], [gates])
            outer.append(hidden)
        every += outer
        below = concat(outer)
    _fix(input.axes[:-1], SPACE)
    layers = fixed(len(every), MIXED)
    final = every[0]
    if len(every) > 1:  # the final states of all layers and directions, one above the other
        final = Axis(final.size, scopes=[frozenset([layers])])
        final.at = {(layers, i): hidden for i, hidden in enumerate(every)}
    final = [layers, *map(_space, pytree.tree_leaves(out[1])[0].shape[1:-1]), final]
    states = [final, list(final)] if isinstance(out[1], tuple) else final
    return [[*input.axes[:-1], below], states]


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
    | forms(["dropout", "alpha_dropout", "feature_alpha_dropout"], same(_dropout))
    | forms(["dropout1d", "dropout2d", "dropout3d"], same(_dropout))
    | forms(["prelu"], same(_prelu))
    | forms(["linear"], same(_linear))
    | forms(["matmul", "bmm", "mm", "mv"], same(_matmul))
    | forms(["einsum"], same(_einsum))
    | forms(["embedding"], same(_embedding))
    | forms(["layer_norm"], same(_layer_norm))
    | forms(["rms_norm"], same(_layer_norm))
    | forms(["group_norm"], same(_group_norm))
    | forms(["batch_norm", "instance_norm"], same(_channel_norm))
    | forms("view reshape flatten unflatten squeeze unsqueeze".split(), same(_regrouped))
    | forms("view_as reshape_as".split(), same(_regrouped))
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
    | forms(["pixel_shuffle"], same(_pixel_shuffle))
    | forms(["interpolate"], same(_spatial()))
    | {
        F.pad: _pad,
        F.scaled_dot_product_attention: _attention,
        operator.getitem: _getitem,
        operator.matmul: _matmul,
        getattr: _getattr,
    }
    | {getattr(torch, f"conv{spatial}d"): _conv(spatial) for spatial in (1, 2, 3)}
    | {
        getattr(torch, f"conv_transpose{spatial}d"): _conv_transpose(spatial)
        for spatial in (1, 2, 3)
    }
    | {
        form: _spatial(spatial)
        for spatial in (1, 2, 3)
        for pool in "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool".split()
        for form in (getattr(holder, f"{pool}{spatial}d", None) for holder in (torch, F))
        if form is not None
    }
)
MODULES: dict[type[nn.Module], Callable] = {
    nn.MultiheadAttention: _multihead_attention
} | dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm)
MODULES |= dict.fromkeys((nn.RNN, nn.GRU, nn.LSTM), _recurrent)
