"""Layers on stacked values.

`FUNCTIONS` holds the functions that layers call, with signatures as in `fastgeo.operators`;
`MODULES` the layers that are one node of a graph, under their type. Those take N, the layer, its
state and its inputs.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    stacked_channel_norm,
    stacked_conv,
    stacked_conv_transpose,
    stacked_group_norm,
    stacked_layer_norm,
    stacked_linear,
    stacked_rms_norm,
)
from torch import nn
from torch.utils import _pytree as pytree

from fastgeo.fusion import channel_norm_run, group_norm_run
from fastgeo.values import NoForm, Stacked, aligned, any_stacked, by_loop, each, rank_of

State = Mapping[str, Any]  # name -> Stacked, or a tensor that all networks share


def _linear(n, input, weight, bias=None):
    bias = None if bias is None else each(bias, n)
    if rank_of(input) == 1:
        return Stacked(stacked_linear(each(input, n)[:, None], each(weight, n), bias)[:, 0])
    return Stacked(stacked_linear(each(input, n), each(weight, n), bias))


def _conv(function: Callable, spatial: int) -> Callable:
    def stacked(n, input, weight, bias=None, *args, **kwargs):
        bias = None if bias is None else each(bias, n)
        x, weight = each(input, n), each(weight, n)
        if rank_of(input) == spatial + 1:  # [C, ...] without B
            return Stacked(function(x[:, None], weight, bias, *args, **kwargs)[:, 0])
        return Stacked(function(x, weight, bias, *args, **kwargs))

    return stacked


def _channelwise(function: Callable, spatial: int | None = None) -> Callable:
    """What treats every channel alike, its input [B, C, ...], or [C, ...] of `spatial` axes."""

    def stacked(n, input, *args, **kwargs):
        x = input.tensor
        if spatial is not None and x.ndim == spatial + 2:
            return Stacked(function(x, *args, **kwargs))
        out = function(x.transpose(0, 1).flatten(1, 2), *args, **kwargs)
        return pytree.tree_map(lambda t: Stacked(t.unflatten(1, (n, -1)).transpose(0, 1)), out)

    return stacked


def _pad(n, input, pad, mode="constant", value=None):
    if mode == "constant":
        return Stacked(F.pad(input.tensor, pad, mode, value))
    return _channelwise(F.pad, len(pad) // 2)(n, input, pad, mode, value)


def _group_norm(n, input, num_groups, weight=None, bias=None, eps=1e-5):
    weight, bias = (None if t is None else each(t, n) for t in (weight, bias))
    return Stacked(stacked_group_norm(each(input, n), num_groups, weight, bias, eps))


def _run(norm: Callable) -> Callable:
    """A normalisation of images with a residual sum and ReLU behind it (`fastgeo.fusion`)."""

    def stacked(n, input, weight, bias, eps, residual, relu):
        x = each(input, n)
        weight, bias = (None if t is None else each(t, n) for t in (weight, bias))
        if residual is None or (isinstance(residual, Stacked) and residual.tensor.shape == x.shape):
            residual = None if residual is None else residual.tensor
            return Stacked(norm(x, weight, bias, eps, residual=residual, relu=relu))
        y = norm(x, weight, bias, eps)  # and a sum that broadcasts
        y = y + aligned(residual, max(rank_of(input), rank_of(residual)))
        return Stacked(F.relu(y) if relu else y)

    return stacked


def _one_group(x, *args, **kwargs):
    return stacked_group_norm(x, 1, *args, **kwargs)


def _layer_norm(n, input, normalized_shape, weight=None, bias=None, eps=1e-5):
    weight, bias = (None if t is None else each(t, n) for t in (weight, bias))
    return Stacked(stacked_layer_norm(each(input, n), normalized_shape, weight, bias, eps))


def _rms_norm(n, input, normalized_shape, weight=None, eps=None):
    weight = None if weight is None else each(weight, n)
    return Stacked(stacked_rms_norm(each(input, n), normalized_shape, weight, eps))


def _prelu(n, input, weight):
    weight = Stacked(each(weight, n))  # [N, C] or [N, 1]
    if rank_of(input) > 1:
        weight = Stacked(weight.tensor.unflatten(-1, (-1, *(1,) * (rank_of(input) - 2))))
    x, weight = each(input, n), aligned(weight, rank_of(input))
    return Stacked(torch.where(x > 0, x, weight * x))


def _embedding(
    n,
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    if max_norm is not None or scale_grad_by_freq:
        raise NoForm("norms are bounded, or gradients scaled, by network", by_loop)
    weight = each(weight, n)  # [N, V, D]
    if padding_idx is not None:  # a row that is never trained
        p = padding_idx % weight.shape[1]
        weight = torch.cat([weight[:, :p], weight[:, p : p + 1].detach(), weight[:, p + 1 :]], 1)
    first_row = weight.shape[1] * torch.arange(n, device=weight.device)
    rows = each(input, n) + first_row.view(-1, *(1,) * rank_of(input))
    if isinstance(input, Stacked):  # an index out of range must not be a row of another network
        inside = (input.tensor >= 0) & (input.tensor < weight.shape[1])
        rows = torch.where(inside, rows, n * weight.shape[1])
    return Stacked(F.embedding(rows, weight.flatten(0, 1)))


def _attention(
    n,
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
):
    options = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    if not dropout_p and not any_stacked((query, key, value, attn_mask)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    rank = max(map(rank_of, (query, key, value)))
    q, k, v = (aligned(Stacked(each(t, n)), rank) for t in (query, key, value))
    if isinstance(attn_mask, Stacked) or rank_of(attn_mask) > 2:
        attn_mask = aligned(Stacked(each(attn_mask, n)), rank)
        attn_mask = attn_mask.expand(n, *q.shape[1:-2], *attn_mask.shape[-2:])
    if rank < 4:  # fused kernels want [B, heads, T, D]
        return Stacked(F.scaled_dot_product_attention(q, k, v, attn_mask, **options))
    batches = [torch.broadcast_shapes(q.shape[:2], k.shape[:2], v.shape[:2])] * 3
    q, k, v = (
        t.expand(*b, *t.shape[2:]).flatten(0, 1) for t, b in zip((q, k, v), batches, strict=True)
    )
    if rank_of(attn_mask) > 2:
        attn_mask = attn_mask.flatten(0, 1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    return Stacked(out.unflatten(0, (n, -1)))


def _multihead_attention(
    n,
    layer: nn.MultiheadAttention,
    state: State,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    if rank_of(query) != 3:
        raise NoForm("its input has no batch axis")
    if is_causal and attn_mask is None:
        raise NoForm("is_causal comes without a mask")
    own = {name: each(tensor, n) for name, tensor in state.items()}
    if "in_proj_weight" in own:
        weights = own["in_proj_weight"].chunk(3, 1)
    else:
        weights = [own[f"{name}_proj_weight"] for name in "qkv"]
    biases = own["in_proj_bias"].chunk(3, 1) if "in_proj_bias" in own else [None] * 3
    if query is key is value and "in_proj_weight" in own:
        bias = own.get("in_proj_bias")
        rows = stacked_linear(each(query, n), own["in_proj_weight"], bias).chunk(3, -1)
    else:
        inputs = (each(t, n) for t in (query, key, value))
        rows = [stacked_linear(*three) for three in zip(inputs, weights, biases, strict=True)]
    if not layer.batch_first:
        rows = [t.transpose(1, 2) for t in rows]
    q, *both = rows  # [N, B, T, heads * D]
    batch, length = q.shape[1], both[0].shape[2]
    if "bias_k" in own:
        last = (own[name].expand(-1, batch, -1, -1) for name in ("bias_k", "bias_v"))
        both = [torch.cat(two, 2) for two in zip(both, last, strict=True)]
    if layer.add_zero_attn:
        both = [F.pad(t, (0, 0, 0, 1)) for t in both]
    bias = _bias(n, batch, attn_mask, key_padding_mask, q.dtype)
    if bias is not None:  # what was added to the keys is always looked at
        bias = F.pad(bias, (0, both[0].shape[2] - length))
    q, k, v = (
        t.unflatten(-1, (layer.num_heads, -1)).transpose(2, 3).flatten(0, 1) for t in (q, *both)
    )
    if need_weights:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        weights = (scores if bias is None else scores + bias).softmax(-1)
        weights = F.dropout(weights, layer.dropout, layer.training)
        out = weights @ v
        weights = weights.unflatten(0, (n, -1))  # [N, B, heads, T, S]
        weights = Stacked(weights.mean(2) if average_attn_weights else weights)
    else:
        dropout = layer.dropout if layer.training else 0.0
        weights, out = None, F.scaled_dot_product_attention(q, k, v, bias, dropout)
    out = out.unflatten(0, (n, -1)).transpose(2, 3).flatten(3)
    out = stacked_linear(out, own["out_proj.weight"], own.get("out_proj.bias"))
    return Stacked(out if layer.batch_first else out.transpose(1, 2)), weights


def _bias(n, batch, attn_mask, key_padding_mask, dtype):
    """The masks of nn.MultiheadAttention as one term of the scores [N * B, heads, T, S], or None.

    Args:
        n, batch: N and B.
        attn_mask: of one network [T, S] or [B * heads, T, S]; True, or a large negative number,
            where nothing is to be looked at.
        key_padding_mask: of one network [B, S], in the same sense.
        dtype: of the scores.
    """
    terms = []
    for mask, rank in ((attn_mask, 2), (key_padding_mask, 1)):
        if mask is None:
            continue
        t = mask.tensor if isinstance(mask, Stacked) else mask[None]  # [N or 1, ...]
        if t.dtype == torch.bool:
            t = torch.zeros_like(t, dtype=dtype).masked_fill(t, -math.inf)
        if rank == 1:
            t = t[:, :, None, None]
        else:
            t = t[:, None, None] if t.ndim == 3 else t.unflatten(1, (batch, -1))
        terms.append(t)  # [N or 1, B or 1, heads or 1, T or 1, S]
    if not terms:
        return None
    bias = sum(terms)
    if bias.shape[:3] == (1, 1, 1):
        return bias[0, 0, 0]
    return bias.expand(n, batch, *bias.shape[2:]).flatten(0, 1)


def _batch_norm(n, layer: nn.modules.batchnorm._BatchNorm, state: State, input):
    layer._check_input_dim(each(input, n)[0])
    own = {name: each(tensor, n) for name, tensor in state.items()}
    weight, bias = (own[name].flatten() if name in own else None for name in ("weight", "bias"))
    mean, variance = own.get("running_mean"), own.get("running_var")
    if layer.training and not layer.track_running_stats:
        mean = variance = None
    updated = layer.training and mean is not None
    momentum = layer.momentum
    if updated:
        own["num_batches_tracked"].add_(1)
        if momentum is None:  # the mean of all batches
            momentum = 1 / own["num_batches_tracked"][0].item()
    # Copies: the backward pass wants them as they are, and they may be views of what is updated.
    statistics = [None if t is None else t.flatten().clone() for t in (mean, variance)]
    x = each(input, n).transpose(0, 1).flatten(1, 2)
    out = F.batch_norm(
        x, *statistics, weight, bias, layer.training or mean is None, momentum or 0.0, layer.eps
    )
    if updated:
        for tensor, new in zip((mean, variance), statistics, strict=True):
            tensor.copy_(new.view_as(tensor))
    return Stacked(out.unflatten(1, (n, -1)).transpose(0, 1))


# --- Tables ---------------------------------------------------------------------------------------

FUNCTIONS: dict[Callable | str, Callable] = {
    F.linear: _linear,
    torch.conv1d: _conv(stacked_conv, 1),
    torch.conv2d: _conv(stacked_conv, 2),
    torch.conv3d: _conv(stacked_conv, 3),
    torch.conv_transpose1d: _conv(stacked_conv_transpose, 1),
    torch.conv_transpose2d: _conv(stacked_conv_transpose, 2),
    torch.conv_transpose3d: _conv(stacked_conv_transpose, 3),
    F.embedding: _embedding,
    torch.prelu: _prelu,
    F.scaled_dot_product_attention: _attention,
    F.pad: _pad,
    F.interpolate: _channelwise(F.interpolate),
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    group_norm_run: _run(_one_group),
    channel_norm_run: _run(stacked_channel_norm),
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
} | {
    form: _channelwise(form, spatial)
    for spatial in (1, 2, 3)
    for pool in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
    for form in (
        getattr(module, f"{pool}{spatial}d")
        for module in (torch, F)
        if hasattr(module, f"{pool}{spatial}d")
    )
}
MODULES: dict[type[nn.Module], Callable] = {
    nn.MultiheadAttention: _multihead_attention
} | dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm)
