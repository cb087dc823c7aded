"""Stacked forms of the functions that layers call; see `fastgeo.stacking.forms.arithmetic`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    stacked_group_norm,
    stacked_layer_norm,
    stacked_linear,
    stacked_rms_norm,
)
from fastgeo_kernels.stacked.plain import lies_around
from torch.utils import _pytree as pytree

from fastgeo.stacking import fusion, products
from fastgeo.stacking.stacked import Stacked, aligned, any_stacked, batched, each, rank_of


def linear(n, input, weight, bias=None):
    if (out := products.waiting(input, weight, bias)) is not None:
        return out
    bias = None if bias is None else each(bias, n)
    if rank_of(input) == 1:
        return Stacked(stacked_linear(each(input, n)[:, None], each(weight, n), bias)[:, 0])
    return Stacked(stacked_linear(each(input, n), each(weight, n), bias))


def conv(function: Callable, spatial: int) -> Callable:
    def stacked(n, input, weight, bias=None, *args, **kwargs):
        bias = None if bias is None else each(bias, n)
        x, weight = each(input, n), each(weight, n)
        if rank_of(input) == spatial + 1:  # [C, ...] without B
            return Stacked(function(x[:, None], weight, bias, *args, **kwargs)[:, 0])
        return Stacked(function(x, weight, bias, *args, **kwargs))

    return stacked


def channelwise(spatial: int | None, function: Callable, n: int, input, *args, **kwargs):
    """What treats every channel alike, its input [B, C, ...], or [C, ...] of `spatial` axes."""
    x = input.tensor
    if spatial is not None and x.ndim == spatial + 2:
        return Stacked(function(x, *args, **kwargs))
    if lies_around(x):
        out = function(x.flatten(0, 1), *args, **kwargs)
        return pytree.tree_map(lambda t: Stacked(t.unflatten(0, (n, -1))), out)
    out = function(x.transpose(0, 1).flatten(1, 2), *args, **kwargs)
    return pytree.tree_map(lambda t: Stacked(t.unflatten(1, (n, -1)).transpose(0, 1)), out)


def pad(n, input, pad, mode="constant", value=None):
    if len(pad) > 2 * rank_of(input):
        raise ValueError("its padding is of more axes than there are")
    if mode == "constant":
        return Stacked(F.pad(input.tensor, pad, mode, value))
    return channelwise(len(pad) // 2, F.pad, n, input, pad, mode, value)


def group_norm(n, input, num_groups, weight=None, bias=None, eps=1e-5, cudnn_enabled=True):
    if num_groups == 1 and (out := fusion.waiting("group", input, weight, bias, eps)) is not None:
        return out
    weight, bias = (None if t is None else each(t, n) for t in (weight, bias))
    return Stacked(stacked_group_norm(each(input, n), num_groups, weight, bias, eps))


def layer_norm(n, input, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):
    if rank_of(input) == 4 and len(normalized_shape) == 1:  # perhaps of an image's channels
        if (out := fusion.waiting("layer", input, weight, bias, eps)) is not None:
            return out
    weight, bias = (None if t is None else each(t, n) for t in (weight, bias))
    return Stacked(stacked_layer_norm(each(input, n), normalized_shape, weight, bias, eps))


def rms_norm(n, input, normalized_shape, weight=None, eps=None):
    weight = None if weight is None else each(weight, n)
    return Stacked(stacked_rms_norm(each(input, n), normalized_shape, weight, eps))


def embedding(
    n,
    input,
    weight,
    padding_idx=None,
    max_norm=None,
    norm_type=2.0,
    scale_grad_by_freq=False,
    sparse=False,
):
    weight = each(weight, n)  # [N, V, D]
    first_row = weight.shape[1] * torch.arange(n, device=weight.device)
    rows = each(input, n) + first_row.view(-1, *(1,) * rank_of(input))
    if isinstance(input, Stacked):  # an index out of range must not be a row of another network
        inside = (input.tensor >= 0) & (input.tensor < weight.shape[1])
        rows = torch.where(inside, rows, n * weight.shape[1])
    if max_norm is not None:  # which shortens, in place, the rows that are looked up
        with torch.no_grad():
            F.embedding(rows, weight.flatten(0, 1), None, max_norm, norm_type)
    if padding_idx is not None:  # a row that is never trained
        p = padding_idx % weight.shape[1]
        weight = torch.cat([weight[:, :p], weight[:, p : p + 1].detach(), weight[:, p + 1 :]], 1)
    options = dict(scale_grad_by_freq=scale_grad_by_freq)
    return Stacked(F.embedding(rows, weight.flatten(0, 1), **options))  # no gradient is sparse


def attention(
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


def channel_norm(
    function: Callable,
    n,
    input,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    training=None,
    momentum=0.1,
    eps=1e-5,
    *,
    use_input_stats=None,
):
    """F.batch_norm or F.instance_norm, whose statistics are by channel."""
    training = training if use_input_stats is None else use_input_stats
    training = function is F.instance_norm if training is None else training
    weight, bias = (None if t is None else each(t, n).flatten() for t in (weight, bias))
    statistics = [None if t is None else each(t, n) for t in (running_mean, running_var)]
    # Copies: the backward pass wants them as they are, and may be given views of what changes.
    now = [None if t is None else t.flatten().clone() for t in statistics]
    x = each(input, n).transpose(0, 1).flatten(1, 2)
    out = function(x, *now, weight, bias, training, momentum, eps)
    if training:
        for tensor, new in zip(statistics, now, strict=True):
            if tensor is not None and new is not None:
                tensor.copy_(new.view_as(tensor))
    return Stacked(out.unflatten(1, (n, -1)).transpose(0, 1))


def weight_norm(n, v, g, dim=0):
    return batched(lambda v, g: v * (g / torch.norm_except_dim(v, 2, dim)), n, v, g)


def bilinear(n, input1, input2, weight, bias=None):
    a, b, weight = (each(t, n) for t in (input1, input2, weight))
    out = torch.einsum("n...i,noij,n...j->n...o", a, weight, b)
    return Stacked(out if bias is None else out + aligned(Stacked(each(bias, n)), out.ndim - 1))
