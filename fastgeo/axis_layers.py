"""How layers carry the permutations of their inputs' axes to their output's.

`FUNCTIONS` holds rules of the functions that layers call, as in `fastgeo.axis_rules`; `MODULES`
those of layers that are one node of a graph, under their type. Those take the output, the layer,
its state and its inputs.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fastgeo.axes import Axis, concat, cut, fix, fixed, split
from fastgeo.axis_values import MIXED, NoRule, Value, fix_all, joined, unify_all, values_in
from fastgeo.values import forms, same

SPACE = "its positions are those of an image or a sequence"


def _linear(out, input, weight, bias=None):
    unify_all(input.axes[-1:], weight.axes[-1:])
    outer = list(weight.axes[:-1])
    if bias is not None:
        unify_all(outer, bias.axes)
    return [*input.axes[:-1], *outer]


def _conv(spatial: int) -> Callable:
    def rule(out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        *batch, channels = input.axes[:-spatial]
        outer, inner, *kernel = weight.axes
        fix_all([*input.axes[-spatial:], *kernel], SPACE)
        if groups > 1:
            why = f"the channels are not made of {groups} groups"
            group, channels = split(channels, [groups, inner.size], why)
            of_weight, _ = split(outer, [groups, outer.size // groups], why)
            unify_all([group], [of_weight])
        unify_all([channels], [inner])
        if bias is not None:
            unify_all([outer], bias.axes)
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
        fix_all([*input.axes[-spatial:], *kernel], SPACE)
        unify_all([channels], [inner])
        if groups > 1:
            why = f"the channels are not made of {groups} groups"
            group, _ = split(inner, [groups, inner.size // groups], why)
            whole = Axis(groups * outer.size)
            unify_all(split(whole, [groups, outer.size], why), [group, outer])
            outer = whole
        if bias is not None:
            unify_all([outer], bias.axes)
        return [*batch, outer, *map(_space, out.shape[-spatial:])]

    return rule


def _embedding(
    out, input, weight, padding_idx=None, max_norm=None, *args, scale_grad_by_freq=False, **kwargs
):
    fix_all(weight.axes[:1], "its rows are looked up by number")
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
            unify_all(q[:-3], t[:-3])
            sizes = [t[-3].size, q[-3].size // t[-3].size]
            groups, _ = split(q[-3], sizes, "the heads of the queries are not made of groups")
            unify_all([groups], [t[-3]])
        batch = q[:-2]
    else:
        shape = out.new_empty(out.shape[:-2], device="meta")
        batch = joined(shape, [Value(None, tuple(t[:-2])) for t in (q, k, v)])
    unify_all(q[-1:], k[-1:])
    unify_all(k[-2:-1], v[-2:-1])
    if is_causal:
        fix_all([q[-2], k[-2]], SPACE)
    if attn_mask is not None:
        scores = Value(None, (*batch, q[-2], k[-2]))
        shape = [axis.size for axis in scores.axes]
        joined(torch.empty(shape, device="meta"), [scores, attn_mask])
    return [*batch, q[-2], v[-1]]


def _prelu(out, input, weight):
    if weight.tensor.numel() > 1:
        unify_all(input.axes[1:2], weight.axes)
    return list(input.axes)


# --- Normalisation --------------------------------------------------------------------------------


def _layer_norm(out, input, normalized_shape, weight=None, bias=None, eps=None, *args):
    for own in (weight, bias):
        if own is not None:
            unify_all(input.axes[-len(own.axes) :], own.axes)
    return list(input.axes)


def _group_norm(out, input, num_groups, weight=None, bias=None, *args, **kwargs):
    channels = input.axes[1]
    if num_groups > 1:
        sizes = [num_groups, channels.size // num_groups]
        split(channels, sizes, f"the channels are not made of {num_groups} groups")
    for own in (weight, bias):
        if own is not None:
            unify_all([channels], own.axes)
    return list(input.axes)


def _channel_norm(out, input, *own, **kwargs):
    """Statistics, a weight and a bias for each channel."""
    for value in values_in((own, kwargs)):
        unify_all(input.axes[1:2], value.axes)
    return list(input.axes)


# --- Space ----------------------------------------------------------------------------------------


def _space(size: int) -> Axis:
    return fixed(size, SPACE)


def _spatial(spatial: int | None = None) -> Callable:
    """Every channel treated alike, the axes behind the channels as space."""

    def rule(out, input, *args, **kwargs):
        outer = 2 if spatial is None else len(input.axes) - spatial
        fix_all(input.axes[outer:], SPACE)
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


def _pixel_shuffle(out, input, upscale_factor):
    channels = input.axes[-3]
    sizes = [out.shape[-3], upscale_factor**2]
    channels, inner = split(channels, sizes, "its channels become pixels")
    fix(inner, "its channels become pixels")
    fix_all(input.axes[-2:], SPACE)
    return [*input.axes[:-3], channels, *map(_space, out.shape[-2:])]


# --- Layers that are one node ---------------------------------------------------------------------


def _batch_norm(out, layer, state: Mapping[str, Value], input):
    for own in state.values():
        if own.axes:
            unify_all(input.axes[1:2], own.axes)
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
        unify_all([concat([q, k, v])], own["in_proj_bias"])
    unify_all(inner, [t.axes[-1] for t in (query, key, value)])
    sizes = [heads, embed // heads]
    (q_heads, _), (k_heads, _), (v_heads, _) = (split(t, sizes, why) for t in (q, k, v))
    unify_all([q], [k])
    unify_all([q_heads], [v_heads])
    unify_all([v], [own["out_proj.weight"][1]])
    if "out_proj.bias" in own:
        unify_all(own["out_proj.weight"][:1], own["out_proj.bias"])
    time = 0 if query.tensor.ndim == 2 or not layer.batch_first else 1
    batch = [query.axes[1 - time]] if query.tensor.ndim == 3 else []
    for other in (key, value):
        unify_all(batch, [other.axes[1 - time]] if batch else [])
    target, source = query.axes[time], key.axes[time]
    unify_all([source], [value.axes[time]])
    masks = [mask for mask in (key_padding_mask, attn_mask) if mask is not None]
    if masks or is_causal:
        for mask in masks:
            fix_all(mask.axes, SPACE)
        fix_all([*batch, target, source], SPACE)
        if attn_mask is not None and attn_mask.tensor.ndim == 3:
            fix_all([q_heads], "the mask differs between heads")
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
            unify_all([own[f"weight_ih_{name}"][1]], [below])
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                if f"{kind}_{name}" in own:
                    unify_all(own[f"{kind}_{name}"][:1], [gates])
            outer.append(hidden)
        every += outer
        below = concat(outer)
    fix_all(input.axes[:-1], SPACE)
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
    forms(["linear"], same(_linear))
    | forms(["embedding"], same(_embedding))
    | forms(["prelu"], same(_prelu))
    | forms(["layer_norm", "rms_norm"], same(_layer_norm))
    | forms(["group_norm"], same(_group_norm))
    | forms(["batch_norm", "instance_norm"], same(_channel_norm))
    | forms(["interpolate"], same(_spatial()))
    | forms(["pixel_shuffle"], same(_pixel_shuffle))
    | {F.pad: _pad, F.scaled_dot_product_attention: _attention}
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
