"""How layers carry the permutations of their inputs' axes to their output's: `axis_rules.py`."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastgeo.symmetry.axes import MIXED, Axis, concat, fix, fixed, split
from fastgeo.symmetry.values import NoRule, Value, fix_all, joined, mixed, unify_all, values_in

SPACE = "its positions are those of an image or a sequence"
NO_PADDING = (0, "valid", *((0,) * d for d in (1, 2, 3)))


def linear(out, input, weight, bias=None):
    unify_all(input.axes[-1:], weight.axes[-1:])
    outer = list(weight.axes[:-1])
    if bias is not None:
        unify_all(outer, bias.axes)
    return mixed([*input.axes[:-1], *outer], input.axes[-1:])


def conv(spatial: int) -> Callable:
    def rule(out, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        *batch, channels = input.axes[:-spatial]
        outer, inner, *kernel = weight.axes
        image = list(input.axes[-spatial:])
        for i, own in enumerate(kernel):  # one position by itself, or several in their order
            if own.size > 1 or out.shape[i - spatial] != image[i].size or padding not in NO_PADDING:
                fix_all([image[i], own], SPACE)
                image[i] = space(out.shape[i - spatial])
        if groups > 1:
            why = f"the channels are not made of {groups} groups"
            group, channels = split(channels, [groups, inner.size], why)
            of_weight, _ = split(outer, [groups, outer.size // groups], why)
            unify_all([group], [of_weight])
        unify_all([channels], [inner])
        if bias is not None:
            unify_all([outer], bias.axes)
        return mixed([*batch, outer, *image], [inner, *input.axes[-spatial:]])

    return rule


def conv_transpose(spatial: int) -> Callable:
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
        image = map(space, out.shape[-spatial:])
        return mixed([*batch, outer, *image], [inner, *input.axes[-spatial:]])

    return rule


def embedding(
    out, input, weight, padding_idx=None, max_norm=None, *args, scale_grad_by_freq=False, **kwargs
):
    fix_all(weight.axes[:1], "its rows are looked up by number")
    return mixed([*input.axes, weight.axes[1]], weight.axes[:1])


def attention(
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
    if dropout_p:
        raise NoRule("it draws random numbers")
    q, k, v = (list(t.axes) for t in (query, key, value))
    if enable_gqa:  # neighbouring heads of queries share keys and values
        for t in (k, v):
            unify_all(q[:-3], t[:-3])
            sizes = [t[-3].size, q[-3].size // t[-3].size]
            groups, _ = split(q[-3], sizes, "the heads of the queries are not made of groups")
            unify_all([groups], [t[-3]])
        batch = q[:-2]
    else:
        batch = joined(out.shape[:-2], [t[:-2] for t in (q, k, v)])
    unify_all(q[-1:], k[-1:])
    unify_all(k[-2:-1], v[-2:-1])
    if is_causal:
        fix_all([q[-2], k[-2]], SPACE)
    if attn_mask is not None:
        scores = [*batch, q[-2], k[-2]]
        joined(torch.Size(axis.size for axis in scores), [scores, attn_mask])
    return [[*batch, q[-2], v[-1]], [*batch, q[-2], k[-2], q[-1]], [*batch, q[-2], k[-2], v[-1]]]


def prelu(out, input, weight):
    if weight.tensor.numel() > 1:
        unify_all(input.axes[1:2], weight.axes)
    return list(input.axes)


# --- Normalisation --------------------------------------------------------------------------------


def weight_norm(out, v, g, dim=0):
    axes = joined(out, [v, g])
    return mixed(axes, [axis for i, axis in enumerate(axes) if i != dim])


def layer_norm(out, input, normalized_shape, *own, **named):
    """Of rms_norm, too."""
    for value in values_in((own, named)):
        unify_all(input.axes[-len(value.axes) :], value.axes)
    return mixed(input.axes, input.axes[-len(normalized_shape) :])


def group_norm(out, input, num_groups, weight=None, bias=None, *args, **kwargs):
    channels = input.axes[1]
    if num_groups > 1:
        sizes = [num_groups, channels.size // num_groups]
        split(channels, sizes, f"the channels are not made of {num_groups} groups")
    for own in (weight, bias):
        if own is not None:
            unify_all([channels], own.axes)
    return mixed(input.axes, input.axes[1:])


def channel_norm(out, input, *own, **kwargs):
    """Statistics, a weight and a bias for each channel."""
    for value in values_in((own, kwargs)):
        unify_all(input.axes[1:2], value.axes)
    return mixed(input.axes, [*input.axes[:1], *input.axes[2:]])


# --- Space ----------------------------------------------------------------------------------------


def space(size: int) -> Axis:
    return fixed(size, SPACE)


def in_space(spatial: int | None = None) -> Callable:
    """Every channel treated alike, the axes behind the channels as space."""

    def rule(out, input, *args, **kwargs):
        outer = 2 if spatial is None else len(input.axes) - spatial
        fix_all(input.axes[outer:], SPACE)
        outs = [out] if isinstance(out, Tensor) else out
        axes = [[*input.axes[:outer], *map(space, own.shape[outer:])] for own in outs]
        return axes + mixed(axes[0], input.axes[outer:])[1:]

    return rule


def pad(out, input, pad, mode="constant", value=None):
    axes = list(input.axes)
    for i, (low, high) in enumerate(zip(pad[::2], pad[1::2], strict=True), 1):
        if not low and not high:
            continue
        if mode == "constant" and low >= 0 and high >= 0:  # equal numbers, in any order
            axes[-i] = concat([Axis(low), axes[-i], Axis(high)])
        else:
            fix(axes[-i], SPACE)
            axes[-i] = space(out.shape[-i])
    return mixed(axes, [axis for axis in input.axes if axis not in axes])


def pixel_shuffle(out, input, upscale_factor):
    channels = input.axes[-3]
    sizes = [out.shape[-3], upscale_factor**2]
    channels, inner = split(channels, sizes, "its channels become pixels")
    fix(inner, "its channels become pixels")
    fix_all(input.axes[-2:], SPACE)
    return mixed([*input.axes[:-3], channels, *map(space, out.shape[-2:])], input.axes[-2:])


# --- Recurrent layers -----------------------------------------------------------------------------


def recurrent(
    out,
    input,
    hx,
    weights,
    has_biases=None,
    num_layers=1,
    dropout=0.0,
    train=False,
    bidirectional=False,
    batch_first=False,
):
    """Every gate of a layer has the hidden channels of that layer and direction."""
    if not isinstance(has_biases, bool):
        raise NoRule("its rule covers no packed sequences")
    for given in [hx] if isinstance(hx, Value) else hx:
        if given.asked or any(axis.why is not None for axis in given.axes):
            raise NoRule("its rule covers no initial state but equal numbers")
    directions = 2 if bidirectional else 1
    each = len(weights) // (num_layers * directions)
    below, every = input.axes[-1], []
    for number in range(num_layers):
        outer = []
        for direction in range(directions):
            first = each * (number * directions + direction)
            of_input, of_hidden, *biases = (w.axes for w in weights[first : first + each])
            if len(biases) > 2:
                raise NoRule("its rule covers no projections")
            rows, hidden = of_hidden
            gates = concat([hidden] * (rows.size // hidden.size))
            unify_all([of_input[1]], [below])
            for own in (of_input, of_hidden, *biases):
                unify_all(own[:1], [gates])
            outer.append(hidden)
        every += outer
        below = concat(outer)
    fix_all(input.axes[:-1], SPACE)
    layers = fixed(len(every), MIXED)
    final = every[0]
    if len(every) > 1:  # the final states of all layers and directions, one above the other
        final = Axis(final.size, scopes=[frozenset([layers])])
        final.at = {(layers, i): hidden for i, hidden in enumerate(every)}
    states = [layers, *map(space, out[1].shape[1:-1]), final]
    return [[*input.axes[:-1], below], *(list(states) for _ in out[1:])]
