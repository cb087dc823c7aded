"""The operations that networks are made of: the stacked form and the axis rule of each.

A row names functions of torch's, wherever they are found (`torch.NAME`, `F.NAME`, the tensor
method, ...), and says how N networks compute them in one call (`fastgeo.stacking.forms`), what they
do to the axes of their inputs (`fastgeo.symmetry.rules`), whether they draw random numbers, and
whether they are elementwise. A function that is in no row but written in Python is run as it is,
for the functions that it calls. A name that torch does not have, or that is in two rows, raises
here.
"""

import types
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from fastgeo_kernels import stacked_conv, stacked_conv_transpose
from torch import Tensor

from fastgeo.forward.standin import TABLE, Operation
from fastgeo.stacking.forms import arithmetic, indexing, layers, recurrent
from fastgeo.symmetry import rules

HOLDERS = (torch, F, Tensor, torch._C._nn, torch._C._VariableFunctions, torch.linalg, torch.special)
NAMES: set[str] = set()  # that have a row


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


def pointwise(names: str, form: Callable = arithmetic.elementwise) -> None:
    """Rows of elementwise functions."""
    make = lambda function: partial(form, function)  # noqa: E731
    row(names, made=make, rule=rules.arithmetic.elementwise, elementwise=True)


pointwise("add", arithmetic.add)
pointwise("relu", arithmetic.relu)
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
row("contiguous", arithmetic.contiguous, rules.arithmetic.kept)
row("to type_as cpu cuda type", made=arithmetic.to, rule=rules.arithmetic.kept)
row("data", arithmetic.data, rules.shapes.same)
row("new_zeros new_ones new_full new_empty", made=arithmetic.alike, rule=rules.arithmetic.alike)
row("new_tensor", made=arithmetic.alike)
row("empty_like full_like ones_like zeros_like", made=arithmetic.alike, rule=rules.arithmetic.alike)
row("one_hot", arithmetic.one_hot, rules.shapes.finer)
row("copy_ zero_", rule=rules.arithmetic.elementwise)

row("matmul bmm mm mv dot", arithmetic.matmul, rules.arithmetic.matmul)
row("einsum", arithmetic.einsum, rules.arithmetic.einsum)
row("addmm addmv baddbmm", made=arithmetic.plus_product, rule=rules.arithmetic.added_matmul)
row("addbmm", made=arithmetic.plus_product)
row("outer ger", arithmetic.outer, rules.arithmetic.outer)
row("inner", rule=rules.layers.linear)

row("sum mean any all", made=arithmetic.reduction, rule=rules.arithmetic.reduction)
row("prod", made=partial(arithmetic.reduction, several=False), rule=rules.arithmetic.reduction)
row("amax amin logsumexp", made=arithmetic.reduction, rule=rules.arithmetic.reduction)
row("nansum nanmean", made=arithmetic.reduction, rule=rules.arithmetic.reduction)
row("count_nonzero", made=arithmetic.reduction)
row("argmax argmin", made=partial(arithmetic.reduction, several=False), rule=rules.arithmetic.place)
row("norm", made=arithmetic.norm, rule=rules.arithmetic.norm)
row("vector_norm", made=partial(arithmetic.reduction, at=1), rule=rules.arithmetic.norm)
row("matrix_norm", made=partial(arithmetic.along, at=1, default=(-2, -1)))
row("var std var_mean std_mean", made=arithmetic.reduction, rule=rules.arithmetic.variance)
row("max", made=arithmetic.extreme(torch.maximum, torch.amax), rule=rules.arithmetic.extreme)
row("min", made=arithmetic.extreme(torch.minimum, torch.amin), rule=rules.arithmetic.extreme)
row("softmax log_softmax softmin", made=arithmetic.along, rule=rules.arithmetic.along)
row("cumprod cumsum logcumsumexp", made=arithmetic.along, rule=rules.arithmetic.in_order)
row("argsort sort", made=partial(arithmetic.along, default=-1), rule=rules.arithmetic.in_order)
row("flip", arithmetic.flip, rules.arithmetic.flip)
row("cummax cummin", made=arithmetic.along, rule=rules.arithmetic.in_order)
row("median nanmedian", made=arithmetic.along)
row("mode", made=partial(arithmetic.along, default=-1))
row("topk", made=partial(arithmetic.along, at=1, default=-1), rule=rules.arithmetic.largest)
row("kthvalue", made=partial(arithmetic.along, at=1, default=-1))
row("glu", made=partial(arithmetic.along, default=-1), rule=rules.arithmetic.glu)
row("gather", made=arithmetic.along, rule=rules.shapes.gather)
row("scatter scatter_add scatter_reduce", made=arithmetic.along, rule=rules.shapes.scatter)
row("roll", made=partial(arithmetic.along, at=1), rule=rules.arithmetic.roll)
row("take_along_dim", made=partial(arithmetic.along, at=1))
row("cosine_similarity", made=partial(arithmetic.along, at=1, default=1))
row("diff", made=partial(arithmetic.along, at=1, default=-1))
row("unfold", made=arithmetic.windows)
row("diagonal", arithmetic.diagonal)
row("tril triu", made=arithmetic.over_last)
row("view_as_real", made=partial(arithmetic.over_last, axes=0), rule=rules.shapes.finer)
row("view_as_complex", made=partial(arithmetic.over_last, axes=1), rule=rules.shapes.as_complex)

row("view", arithmetic.view, rules.shapes.regrouped)
row("reshape", arithmetic.reshape, rules.shapes.regrouped)
row("flatten ravel", arithmetic.flatten, rules.shapes.regrouped)
row("unflatten", arithmetic.unflatten, rules.shapes.regrouped)
row("squeeze", arithmetic.squeeze, rules.shapes.regrouped)
row("unsqueeze", arithmetic.unsqueeze, rules.shapes.regrouped)
row("view_as reshape_as", arithmetic.like(arithmetic.reshape), rules.shapes.regrouped)
row("permute", arithmetic.permute, rules.shapes.permute)
row("transpose swapaxes swapdims", arithmetic.transpose, rules.shapes.transpose)
row("t T", arithmetic.turned, rules.shapes.t)
row("mT", arithmetic.transposed, rules.shapes.turned)
row("movedim moveaxis", arithmetic.movedim, rules.shapes.movedim)
row("expand broadcast_to", arithmetic.expand, rules.shapes.expand)
row("expand_as", arithmetic.like(arithmetic.expand), rules.shapes.expand)
row("repeat tile", arithmetic.repeat, rules.shapes.repeat)
row("repeat_interleave", arithmetic.repeat_interleave, rules.shapes.repeat_interleave)
row("cat concat concatenate", arithmetic.cat, rules.shapes.cat)
row("stack", arithmetic.stack, rules.shapes.stack)
row(
    "chunk split split_with_sizes tensor_split",
    made=partial(arithmetic.along, at=1, default=0),
    rule=rules.shapes.in_parts,
)
row("hsplit", arithmetic.hsplit)
row("unbind", made=partial(arithmetic.along, default=0), rule=rules.shapes.unbind)
row("select", made=arithmetic.along, rule=rules.shapes.select)
row("narrow", made=arithmetic.along, rule=rules.shapes.narrow)
row("index_select", made=indexing.at_indices, rule=rules.shapes.index_select)
row("index_add index_copy index_fill", made=indexing.at_indices, rule=rules.shapes.index_add)
row("index_put", indexing.index_put)
row("__getitem__", indexing.get_item, rules.shapes.getitem)

row("linear", layers.linear, rules.layers.linear)
row("embedding", layers.embedding, rules.layers.embedding)
row("_weight_norm", rule=rules.layers.weight_norm)
row("prelu", layers.prelu, rules.layers.prelu)
row("layer_norm", layers.layer_norm, rules.layers.layer_norm)
row("rms_norm", layers.rms_norm, rules.layers.layer_norm)
row("group_norm", layers.group_norm, rules.layers.group_norm)
row("batch_norm", layers.channel_norm(F.batch_norm), rules.layers.channel_norm)
row("instance_norm", layers.channel_norm(F.instance_norm), rules.layers.channel_norm)
row("pad", layers.pad, rules.layers.pad)
row("interpolate", made=layers.channelwise, rule=rules.layers.in_space())
row("bilinear", layers.bilinear)
row("pixel_shuffle", made=partial(arithmetic.over_last, axes=3), rule=rules.layers.pixel_shuffle)
row("pixel_unshuffle", made=partial(arithmetic.over_last, axes=3))
row("channel_shuffle native_channel_shuffle", made=arithmetic.samplewise)
row("im2col", made=partial(layers.channelwise, spatial=2))
row("col2im", made=partial(layers.channelwise, spatial=1))
row("lstm gru rnn_tanh rnn_relu", made=recurrent.layer, rule=rules.layers.recurrent, random=True)
row("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell", made=recurrent.cell)
row("scaled_dot_product_attention", layers.attention, rules.layers.attention, random=True)
for d in (1, 2, 3):
    row(f"conv{d}d", layers.conv(stacked_conv, d), rules.layers.conv(d))
    row(
        f"conv_transpose{d}d",
        layers.conv(stacked_conv_transpose, d),
        rules.layers.conv_transpose(d),
    )
    pools = f"max_pool{d}d avg_pool{d}d adaptive_avg_pool{d}d adaptive_max_pool{d}d"
    row(pools, made=partial(layers.channelwise, spatial=d), rule=rules.layers.in_space(d))
    with_places = f"max_pool{d}d_with_indices adaptive_max_pool{d}d_with_indices"
    row(with_places, made=partial(layers.channelwise, spatial=d))
    row(f"lp_pool{d}d", None, rules.layers.in_space(d))

row("dropout", arithmetic.dropout, rules.arithmetic.dropout, random=True)
row(
    """alpha_dropout dropout1d dropout2d dropout3d feature_alpha_dropout feature_dropout""",
    made=arithmetic.dropout_of,
    rule=rules.arithmetic.dropout,
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
