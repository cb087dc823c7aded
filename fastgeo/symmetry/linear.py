"""How operations carry linear maps of their inputs' axes to their output's.

A rule is like one of `fastgeo.symmetry.rules`, with the pass that it is of first: with maps on the
axes of its inputs the operation gives its output, with the maps on the output's axes. Where that
holds for permutations alone, `permute_only` says so, as it does of everything that an operation
without such a rule meets; where it holds for orthogonal maps alone, the axis is its own `dual`.

S. Ashkboos et al., "SliceGPT" (arXiv:2401.15024) and "QuaRot" (arXiv:2404.00456), rotate the
residual stream of a transformer behind a norm whose weight is folded; B. Zhang et al. (rotation
symmetry, arXiv:2502.00264) and A. Theus et al., "Generalized Linear Mode Connectivity for
Transformers" (arXiv:2506.22712), match networks by such maps and by those within heads.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from fastgeo.symmetry import rules
from fastgeo.symmetry.axes import Axis, dual, permute_only, unify
from fastgeo.symmetry.carried import Axes, Value, joined, mixed, replaced, values_in

if TYPE_CHECKING:
    from fastgeo.symmetry.mixing import LinearPass

NOT_LINEAR = "it is not linear"
STRUCTURE = "its structure differs between the tensors that meet here"


def permuting(rule: Callable) -> Callable:
    """A rule by which no more than permutations act on what meets."""

    def permuted(out: Any, *args: Any, **kwargs: Any) -> Any:
        if rule is not rules.alike:
            only([axis for value in values_in((args, kwargs)) for axis in value.axes])
        axes = rule(out, *args, **kwargs)
        only(pytree.tree_leaves(axes))
        return axes

    return permuted


def only(axes: Iterable[Axis], why: str = NOT_LINEAR) -> None:
    for axis in axes:
        permute_only(axis, why)


def alike(run: "LinearPass", out, x, *args, **kwargs):
    """A number of the output for each one of the input, which is the same."""
    if out.dtype.is_floating_point != x.tensor.dtype.is_floating_point:
        only(x.axes)
    return list(x.axes)


def sums(run: "LinearPass", out, *terms, alpha=1):
    """Sums and differences. A term without an axis adds to all of its positions alike."""
    values = [term for term in terms if isinstance(term, Value)]
    for i in range(1, out.ndim + 1):
        own = [value.axes[-i] for value in values if value.tensor.ndim >= i]
        if len([axis for axis in own if axis.size > 1]) < len(terms):
            only(own)
    return joined(out, values)


def product(run: "LinearPass", out, x, y):
    """Linear in each factor, as long as the other one is the same along the axis."""
    if x is y:
        return squares(run, out, x, 2)
    values = [value for value in (x, y) if isinstance(value, Value)]
    for weight, value in ((x, y), (y, x)):
        if len(values) == 2 and run.is_weight(weight, value):
            return replaced(value.axes, -1, run.scaled(weight, value.axes[-1]))
    for i in range(1, out.ndim + 1):
        own = [v.axes[-i] for v in values if v.tensor.ndim >= i and v.axes[-i].size > 1]
        if len(own) > 1:
            only(own)
    return joined(out, values)


def quotient(run: "LinearPass", out, x, y, *, rounding_mode=None):
    if rounding_mode is not None:
        only(axis for value in values_in((x, y)) for axis in value.axes)
    elif isinstance(y, Value):
        only(y.axes)
    return product(run, out, x, y)


def squares(run: "LinearPass", out, x, exponent):
    """x * x, of which orthogonal maps keep the sum."""
    if exponent != 2:
        only(x.axes)
        return list(x.axes)
    return [run.squares(axis) for axis in x.axes]


def reduction(run: "LinearPass", out, x, dim=None, keepdim=False, **kwargs):
    dims = (dim,) if isinstance(dim, int) else dim or tuple(range(len(x.axes)))
    for axis in (x.axes[dim] for dim in dims):
        if not axis.find().squares:
            permute_only(axis, "its positions are summed")
    return rules.without(x.axes, dim, keepdim)


def expand(run: "LinearPass", out, x, *args, **kwargs):
    axes = rules.expand(out, x)
    only(axis for axis in axes if axis not in x.axes)  # whose positions are equal
    return axes


def matmul(run: "LinearPass", out, x, y):
    axes_of_x, axes_of_y = list(x.axes), list(y.axes)
    inner = axes_of_y.pop(-2 if len(axes_of_y) > 1 else 0)
    unify(axes_of_x.pop(), dual(inner), STRUCTURE)
    matrix = ([axes_of_x.pop()] if axes_of_x else []) + ([axes_of_y.pop()] if axes_of_y else [])
    only(axes_of_x + axes_of_y)  # a product for each position
    batch = joined(out.shape[: out.ndim - len(matrix)], [axes_of_x, axes_of_y])
    return mixed(batch + matrix, [inner])


def addmm(run: "LinearPass", out, bias, x, y, *, beta=1, alpha=1):
    product, *further = matmul(run, out, x, y)
    if alpha == beta == 1:
        run.has_bias(y, bias)
    only(axis for axis in product[:1])  # to each of which the same is added
    return [joined(out, [product, bias]), *further]


def convolution(run: "LinearPass", out, x, weight, bias, *how):
    """The weight's input channels are contracted, kernels and images in their order."""
    *_, transposed, _, groups = how
    if transposed or groups > 1:
        return permuting(rules.conv)(out, x, weight, bias, *how)
    place = [weight.axes[0], dual(weight.axes[1]), *weight.axes[2:]]
    return rules.conv(out, x, Value(weight.tensor, place), bias, *how)


def layer_norm(run: "LinearPass", out, x, shape, weight, bias, eps):
    """LN(Qx) = Q LN(x) for orthogonal Q that leave equal numbers as they are."""
    last = x.axes[-1]
    if len(shape) > 1:
        only(x.axes[-len(shape) :])
    run.orthogonal(last)
    for atom in last.atoms():
        atom.keeps_mean = True
    if weight is not None:
        if run.is_weight(weight, x):
            last = run.scaled(weight, last)
        else:
            unify(last, weight.axes[-1], STRUCTURE)
            permute_only(last, "its weight differs between positions")
    if bias is not None:
        unify(last, bias.axes[-1], STRUCTURE)
    statistics: Axes = rules.without(x.axes, list(range(-len(shape), 0)), True)
    return [replaced(x.axes, -1, last), statistics, list(statistics)]
