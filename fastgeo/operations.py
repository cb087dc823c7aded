"""The operations that networks are made of: the stacked form and the axis rule of each.

A row names functions of torch's, wherever they are found (`torch.NAME`, `F.NAME`, the tensor
method, ...), and says how N networks compute them in one call (`fastgeo.operators`,
`fastgeo.indexing`, `fastgeo.layers`, `fastgeo.recurrent`), what they do to the axes of their inputs
(`fastgeo.axis_rules`), whether they draw random numbers, and whether they are elementwise. A
function that is in no row but written in Python is run as it is, for the functions that it calls. A
name that torch does not have, or that is in two rows, raises here.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_conv, stacked_conv_transpose
from torch import Tensor

from fastgeo import axis_layers, axis_rules, axis_shapes, indexing, layers, operators, recurrent


class Operation(NamedTuple):
    """What is known of a function.

    Attributes:
        form: takes N and what the function takes, with `Stacked` values; None if there is none.
        rule: takes the output and what the function takes, with axes; None if there is none.
        random: whether every network has random numbers of its own, whatever it is given.
        elementwise: whether it treats every number alike.
    """

    form: Callable | None = None
    rule: Callable | None = None
    random: bool = False
    elementwise: bool = False


HOLDERS = (torch, F, Tensor, torch._C._nn, torch._C._VariableFunctions, torch.linalg, torch.special)
TABLE: dict[Callable, Operation] = {}
NAMES: set[str] = set()  # that have a row


def operation_of(function: Callable) -> Operation | None:
    return TABLE.get(function)


def row(
    names: str,
    form: Callable | None = None,
    rule: Callable | None = None,
    *,
    made: Callable | None = None,
    random: bool = False,
    elementwise: bool = False,
) -> None:
    """Rows of the table; made: gives the stacked form of each function."""
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
            own = form if made is None else made(function)
            TABLE[function] = Operation(own, rule, random, elementwise)


def pointwise(names: str, form: Callable = operators.elementwise) -> None:
    """Rows of elementwise functions."""
    make = lambda function: partial(form, function)  # noqa: E731
    row(names, made=make, rule=axis_rules.elementwise, elementwise=True)


pointwise("add", operators.add)
pointwise("relu", operators.relu)
pointwise(
    """abs acos addcdiv addcmul asin atan atan2 bfloat16 bitwise_and bitwise_not bitwise_or
    bitwise_xor ceil celu clamp clamp_max clamp_min clip clone copysign cos cosh detach div divide
    double elu eq erf erfc exp exp2 expm1 fill float float_power floor floor_divide fmod frac ge
    gelu greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh int isfinite isinf
    isnan isneginf isposinf le leaky_relu lerp less less_equal log log10 log1p log2 logaddexp
    logical_and logical_not logical_or logical_xor logit logsigmoid long lt masked_fill maximum
    minimum mish mul multiply nan_to_num ne neg negative not_equal positive pow reciprocal relu6
    remainder round rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink softsign
    sqrt square sub subtract tan tanh tanhshrink threshold true_divide trunc where xlogy
    bool __and__ __or__ __xor__ __rand__ __ror__ __rxor__ __invert__"""
)
pointwise(
    """absolute acosh angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asinh atanh
    bitwise_left_shift bitwise_right_shift complex conj conj_physical deg2rad digamma entr erfcx
    erfinv expit fix fmax fmin gcd heaviside hypot i0 i1 igamma igammac isclose isreal lcm ldexp
    lgamma logaddexp2 log_ndtr ndtr nextafter polar rad2deg signbit xlog1py __eq__ __lshift__
    __rshift__"""
)
row("contiguous", operators.contiguous, axis_rules.kept)
row("to type_as cpu cuda type", made=operators.to, rule=axis_rules.kept)
row("data", operators.data, axis_shapes.same)
row("new_zeros new_ones new_full new_empty", made=operators.alike, rule=axis_rules.alike)
row("new_tensor", made=operators.alike)
row("empty_like full_like ones_like zeros_like", made=operators.alike, rule=axis_rules.alike)
row("one_hot", operators.one_hot, axis_shapes.finer)
row("copy_ zero_", rule=axis_rules.elementwise)

row("matmul bmm mm mv dot", operators.matmul, axis_rules.matmul)
row("einsum", operators.einsum, axis_rules.einsum)
row("addmm addmv baddbmm", made=operators.plus_product, rule=axis_rules.added_matmul)
row("addbmm", made=operators.plus_product)
row("outer ger", operators.outer, axis_rules.outer)
row("inner", rule=axis_layers.linear)

row("sum mean any all", made=operators.reduction, rule=axis_rules.reduction)
row("prod", made=partial(operators.reduction, several=False), rule=axis_rules.reduction)
row("amax amin logsumexp", made=operators.reduction, rule=axis_rules.reduction)
row("nansum nanmean", made=operators.reduction, rule=axis_rules.reduction)
row("count_nonzero", made=operators.reduction)
row("argmax argmin", made=partial(operators.reduction, several=False), rule=axis_rules.place)
row("norm", made=operators.norm, rule=axis_rules.norm)
row("vector_norm", made=partial(operators.reduction, at=1), rule=axis_rules.norm)
row("matrix_norm", made=partial(operators.along, at=1, default=(-2, -1)))
row("var std var_mean std_mean", made=operators.reduction, rule=axis_rules.variance)
row("max", made=operators.extreme(torch.maximum, torch.amax), rule=axis_rules.extreme)
row("min", made=operators.extreme(torch.minimum, torch.amin), rule=axis_rules.extreme)
row("softmax log_softmax softmin", made=operators.along, rule=axis_rules.along)
row("cumprod cumsum logcumsumexp", made=operators.along, rule=axis_rules.in_order)
row("argsort sort", made=partial(operators.along, default=-1), rule=axis_rules.in_order)
row("flip", operators.flip, axis_rules.flip)
row("cummax cummin", made=operators.along, rule=axis_rules.in_order)
row("median nanmedian", made=operators.along)
row("mode", made=partial(operators.along, default=-1))
row("topk", made=partial(operators.along, at=1, default=-1), rule=axis_rules.largest)
row("kthvalue", made=partial(operators.along, at=1, default=-1))
row("glu", made=partial(operators.along, default=-1), rule=axis_rules.glu)
row("gather", made=operators.along, rule=axis_shapes.gather)
row("scatter scatter_add scatter_reduce", made=operators.along, rule=axis_shapes.scatter)
row("roll", made=partial(operators.along, at=1), rule=axis_rules.roll)
row("take_along_dim", made=partial(operators.along, at=1))
row("cosine_similarity", made=partial(operators.along, at=1, default=1))
row("diff", made=partial(operators.along, at=1, default=-1))
row("unfold", made=operators.windows)
row("diagonal", operators.diagonal)
row("tril triu", made=operators.over_last)
row("view_as_real", made=partial(operators.over_last, axes=0), rule=axis_shapes.finer)
row("view_as_complex", made=partial(operators.over_last, axes=1), rule=axis_shapes.as_complex)

row("view", operators.view, axis_shapes.regrouped)
row("reshape", operators.reshape, axis_shapes.regrouped)
row("flatten ravel", operators.flatten, axis_shapes.regrouped)
row("unflatten", operators.unflatten, axis_shapes.regrouped)
row("squeeze", operators.squeeze, axis_shapes.regrouped)
row("unsqueeze", operators.unsqueeze, axis_shapes.regrouped)
row("view_as reshape_as", operators.like(operators.reshape), axis_shapes.regrouped)
row("permute", operators.permute, axis_shapes.permute)
row("transpose swapaxes swapdims", operators.transpose, axis_shapes.transpose)
row("t T", operators.turned, axis_shapes.t)
row("mT", operators.transposed, axis_shapes.turned)
row("movedim moveaxis", operators.movedim, axis_shapes.movedim)
row("expand broadcast_to", operators.expand, axis_shapes.expand)
row("expand_as", operators.like(operators.expand), axis_shapes.expand)
row("repeat tile", operators.repeat, axis_shapes.repeat)
row("repeat_interleave", operators.repeat_interleave, axis_shapes.repeat_interleave)
row("cat concat concatenate", operators.cat, axis_shapes.cat)
row("stack", operators.stack, axis_shapes.stack)
row(
    "chunk split split_with_sizes tensor_split",
    made=partial(operators.along, at=1, default=0),
    rule=axis_shapes.in_parts,
)
row("hsplit", operators.hsplit)
row("unbind", made=partial(operators.along, default=0), rule=axis_shapes.unbind)
row("select", made=operators.along, rule=axis_shapes.select)
row("narrow", made=operators.along, rule=axis_shapes.narrow)
row("index_select", made=indexing.at_indices, rule=axis_shapes.index_select)
row("index_add index_copy index_fill", made=indexing.at_indices, rule=axis_shapes.index_add)
row("index_put", indexing.index_put)
row("__getitem__", indexing.get_item, axis_shapes.getitem)

row("linear", layers.linear, axis_layers.linear)
row("embedding", layers.embedding, axis_layers.embedding)
row("_weight_norm", rule=axis_layers.weight_norm)
row("prelu", layers.prelu, axis_layers.prelu)
row("layer_norm", layers.layer_norm, axis_layers.layer_norm)
row("rms_norm", layers.rms_norm, axis_layers.layer_norm)
row("group_norm", layers.group_norm, axis_layers.group_norm)
row("batch_norm", layers.channel_norm(F.batch_norm), axis_layers.channel_norm)
row("instance_norm", layers.channel_norm(F.instance_norm), axis_layers.channel_norm)
row("pad", layers.pad, axis_layers.pad)
row("interpolate", made=layers.channelwise, rule=axis_layers.in_space())
row("bilinear", layers.bilinear)
row("pixel_shuffle", made=partial(operators.over_last, axes=3), rule=axis_layers.pixel_shuffle)
row("pixel_unshuffle", made=partial(operators.over_last, axes=3))
row("channel_shuffle native_channel_shuffle", made=operators.samplewise)
row("im2col", made=partial(layers.channelwise, spatial=2))
row("col2im", made=partial(layers.channelwise, spatial=1))
row("lstm gru rnn_tanh rnn_relu", made=recurrent.layer, rule=axis_layers.recurrent, random=True)
row("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", made=recurrent.cell)
row("scaled_dot_product_attention", layers.attention, axis_layers.attention, random=True)
for d in (1, 2, 3):
    row(f"conv{d}d", layers.conv(stacked_conv, d), axis_layers.conv(d))
    row(
        f"conv_transpose{d}d",
        layers.conv(stacked_conv_transpose, d),
        axis_layers.conv_transpose(d),
    )
    pools = f"max_pool{d}d avg_pool{d}d adaptive_avg_pool{d}d adaptive_max_pool{d}d"
    row(pools, made=partial(layers.channelwise, spatial=d), rule=axis_layers.in_space(d))
    with_places = f"max_pool{d}d_with_indices adaptive_max_pool{d}d_with_indices"
    row(with_places, made=partial(layers.channelwise, spatial=d))
    row(f"lp_pool{d}d", None, axis_layers.in_space(d))

row("dropout", operators.dropout, axis_rules.dropout, random=True)
row(
    """alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout""",
    made=operators.dropout_of,
    rule=axis_rules.dropout,
    random=True,
)
row(
    """bernoulli gumbel_softmax multinomial normal poisson rand rand_like randint randint_like
    randn randn_like randperm rrelu native_dropout bernoulli_ cauchy_ exponential_ geometric_
    log_normal_ normal_ random_ uniform_ dropout_ feature_dropout_ alpha_dropout_ rrelu_ binomial
    feature_alpha_dropout_ fractional_max_pool2d fractional_max_pool3d _sample_dirichlet
    _standard_gamma""",
    random=True,
)
