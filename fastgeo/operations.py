"""The operations that networks are made of: the stacked form and the axis rules of each.

A row names functions of torch's, wherever they are found (`torch.NAME`, `F.NAME`, the tensor
method, `torch.ops.aten.NAME`, ...), and says how N networks compute them in one call
(`fastgeo.stacking.forms`) and what they do to the axes of their inputs, where those are permuted
(`fastgeo.symmetry.rules`) and where linear maps act on them (`fastgeo.symmetry.linear`; True: as
where they are permuted; without it, permutations are all that may act on what they meet).
Whether they draw random numbers or are elementwise is what torch's tags say, unless a row says so.
A function in no row runs stacked by torch's batching rule, or if it is written in Python as it is,
for the functions that it calls; its axes are those of the operations that it is made of. A name
that torch does not have, or that is in two rows, raises here.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_conv, stacked_conv_transpose
from torch import Tensor

from fastgeo.forward.standin import TABLE, tagged
from fastgeo.stacking.forms import arithmetic, layers, recurrent
from fastgeo.stacking.stacked import batched
from fastgeo.symmetry import linear as maps
from fastgeo.symmetry import rules

HOLDERS: tuple[Any, ...] = (torch, F, Tensor, torch._C._nn, torch._C._VariableFunctions)
HOLDERS += (torch.linalg, torch.special)
HOLDERS += (torch.ops.aten,)  # what functions are made of, to which rules belong
NAMES: set[str] = set()  # that have a row


def row(
    names: str,
    form: Callable | None = None,
    rule: Callable | None = None,
    *,
    form_of: Callable | None = None,
    linear: Callable | bool | None = None,
    **flags: bool,
) -> None:
    """Rows of the table; form_of: takes the function itself first."""
    for name in names.split():
        if name in NAMES:
            raise ValueError(f"{name} has two rows")
        NAMES.add(name)
        found = [getattr(holder, name) for holder in HOLDERS if hasattr(holder, name)]
        if not found:
            raise AttributeError(f"torch has no function {name}")
        for function in found:
            if isinstance(function, property | types.GetSetDescriptorType):
                function = function.__get__
            own = form if form_of is None else partial(form_of, function)
            ways: dict[str, Any] = dict(form=own, rule=rule, linear=linear, **flags)
            TABLE[function] = tagged(name)._replace(**ways)


row("add", form_of=arithmetic.add, linear=maps.sums)
row("sub subtract", elementwise=True, linear=maps.sums)
row("mul multiply", elementwise=True, linear=maps.product)
row("div divide", elementwise=True, linear=maps.quotient)
row("neg", elementwise=True, linear=maps.alike)
row("pow", elementwise=True, linear=maps.squares)
row("relu", form_of=arithmetic.relu)
row("float half bfloat16 double int long bool hardswish", elementwise=True)
row("detach", elementwise=True, linear=maps.alike)
row("equal", elementwise=False)
row("max min", rule=rules.extreme, elementwise=False)
row("to type_as cpu cuda type", form_of=arithmetic.to)
row("data", arithmetic.data)
row("moveaxis", partial(batched, torch.movedim))
row("prelu", form_of=arithmetic.whole)
row(
    "gumbel_softmax dropout1d dropout2d dropout3d fractional_max_pool2d fractional_max_pool3d",
    random=True,
)
row("contiguous", arithmetic.contiguous)
row("new_zeros new_ones new_full new_empty", form_of=arithmetic.alike, rule=rules.alike)
row("empty_like full_like ones_like zeros_like", form_of=arithmetic.alike, rule=rules.alike)
row("new_tensor", form_of=arithmetic.alike)
row("_to_copy clone alias", rule=rules.elementwise, linear=maps.alike)
row("copy fill zero lift_fresh", rule=rules.elementwise)
row("dropout", arithmetic.dropout)
row("masked_fill", form_of=arithmetic.masked_fill)
row("count_nonzero", arithmetic.count_nonzero)

row("matmul bmm mm mv dot", arithmetic.matmul, rules.matmul, linear=maps.matmul)
row("addmm", arithmetic.addmm, linear=maps.addmm)
row("argmax argmin", form_of=arithmetic.place, rule=rules.place)
row("sum mean", rule=rules.reduction, linear=maps.reduction)
row("any all prod amax amin", rule=rules.reduction)
row("var std var_mean std_mean", rule=rules.variance)
row("cumsum cumprod logcumsumexp cummax cummin flip", rule=rules.in_order)
row("sort argsort", rule=rules.stable_sort)
row("topk roll", rule=rules.at_place)

row(
    "view reshape flatten ravel unflatten view_as reshape_as",
    form_of=arithmetic.regrouped,
    rule=rules.regrouped,
    linear=True,
)
row("_unsafe_view _reshape_alias squeeze unsqueeze", rule=rules.regrouped, linear=True)
row("permute", form_of=arithmetic.permute, rule=rules.permute, linear=True)
row("as_strided", rule=rules.restrided)
row("transpose swapaxes swapdims", arithmetic.transpose, rules.transpose, linear=True)
row("expand", rule=rules.expand, linear=maps.expand)
row("repeat", rule=rules.repeat)
row("cat concat concatenate", arithmetic.cat, rules.cat, linear=True)
row("stack", rule=rules.stack, linear=True)
row("split split_with_sizes unsafe_split unsafe_split_with_sizes", rule=rules.in_parts, linear=True)
row("unbind", rule=rules.unbind, linear=True)
row("select", rule=rules.select, linear=True)
row("slice", rule=rules.sliced, linear=True)
row("view_as_real", rule=rules.finer)
row("view_as_complex", rule=rules.as_complex)
row("index _unsafe_index", rule=rules.index)
row("index_put _unsafe_index_put", arithmetic.index_put, rules.index_put)
row("gather", rule=rules.gather)
row("scatter scatter_add scatter_reduce", rule=rules.scatter)
row("__getitem__", arithmetic.get_item)

row("linear", layers.linear)
row("bilinear", layers.bilinear)
row("embedding", layers.embedding, rules.embedding, linear=True)
row("_weight_norm", layers.weight_norm)
row("layer_norm", layers.layer_norm)
row("native_layer_norm", linear=maps.layer_norm)
row("rms_norm", layers.rms_norm)
row("group_norm", layers.group_norm)
row("batch_norm instance_norm", form_of=layers.channel_norm)
row("pad", layers.pad)
row("constant_pad_nd", rule=rules.pad)
row("convolution", rule=rules.conv, linear=maps.convolution)
row("mkldnn_rnn_layer", rule=rules.recurrent_layer)
row("native_group_norm", rule=rules.group_norm)
row("native_batch_norm _native_batch_norm_legit_no_training", rule=rules.batch_norm)
row("interpolate", form_of=partial(layers.channelwise, None))
row("lstm gru rnn_tanh rnn_relu", form_of=recurrent.layer)
row("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", form_of=recurrent.cell)
row("scaled_dot_product_attention", layers.attention)
for d in (1, 2, 3):
    row(f"conv{d}d", layers.conv(stacked_conv, d))
    row(f"conv_transpose{d}d", layers.conv(stacked_conv_transpose, d))
    for pool in ("max_pool", "adaptive_max_pool", "avg_pool", "adaptive_avg_pool"):
        form_of, rule = partial(layers.channelwise, d), rules.in_space(d)
        row(f"{pool}{d}d", form_of=form_of, rule=rule)
        if "max" in pool:
            row(f"{pool}{d}d_with_indices", form_of=form_of, rule=rule)
    if d > 1:
        row(f"_adaptive_avg_pool{d}d", rule=rules.in_space(d))
