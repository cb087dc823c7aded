"""In-place operations of a traced graph, made into ones that return a new value."""

import inspect
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from fastgeo import layers, operators

# One node each: their forward branches on their inputs, or they have state of their own.
WHOLE = (nn.MultiheadAttention, nn.modules.batchnorm._BatchNorm)

OUT_OF_PLACE = {
    getattr(operator, f"i{name}"): getattr(operator, f"{name}_" if name in ("and", "or") else name)
    for name in "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift".split()
}


class InPlace(Exception):
    """Says in one sentence which operation must stay in place."""


def _name(target: Callable | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


# Names of operations whose result is in memory of its own; any other may be a view.
_FRESH = {_name(target) for target in operators.FUNCTIONS | layers.FUNCTIONS}
_FRESH |= set(
    """
    bernoulli bilinear cumsum empty_like floordiv full_like glu instance_norm mod new_empty new_full
    new_ones new_zeros ones_like rand_like randn_like zeros_like
    """.split()
)
_FRESH -= set(
    """
    bfloat16 chunk contiguous detach double dropout einsum expand expand_as flatten float
    getattr getitem half permute reshape reshape_as split squeeze swapaxes to transpose
    type_as unflatten unsqueeze view view_as
    """.split()
)


def without_in_place(graph: fx.Graph, module: nn.Module) -> None:
    """Make every in-place operation return a new value, which later uses of the old one then get.

    Raises:
        InPlace: an operation that changes a parameter, a buffer, or a value that may share memory
            with one that is used again.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        changed = _changed(node)
        if changed is None:
            continue
        later = {user for user in place if place[user] > place[node]}
        shared = _sharing(changed, later, module)
        if any(other.op == "get_attr" for other in shared):
            raise InPlace(f"{node.format_node()} changes a parameter or buffer in place")
        if any(later & other.users.keys() for other in shared if other is not changed):
            raise InPlace(f"{node.format_node()} changes in place a value that is used again")
        changed.replace_all_uses_with(node, later.__contains__)


def _changed(node: fx.Node) -> fx.Node | None:
    """The node that a node changes in place; the node itself becomes one that does not."""
    if node.op not in ("call_function", "call_method"):
        return None
    name, target, kwargs = _name(node.target), node.target, dict(node.kwargs)
    if kwargs.get("out") is not None:
        raise InPlace(f"{node.format_node()} works in place")
    if node.op == "call_function" and "inplace" in _parameters(target):
        bound = inspect.signature(target).bind(*node.args, **kwargs).arguments
        inplace = bound.get("inplace") and bound.get("training") is not False
        bound["inplace"] = False
        args, kwargs = (bound.pop(next(iter(bound))),), bound
        if not inplace:
            node.args, node.kwargs = args, kwargs
            return None
    elif target in OUT_OF_PLACE:
        target, args = OUT_OF_PLACE[target], node.args
    elif name.endswith("_") and not name.endswith("__") and target not in OUT_OF_PLACE.values():
        holder = torch if node.op == "call_function" else Tensor
        if not callable(getattr(holder, name[:-1], None)):
            raise InPlace(f"{node.format_node()} works in place")
        target = getattr(holder, name[:-1]) if node.op == "call_function" else name[:-1]
        args = node.args
    else:
        return None
    node.target, node.args, node.kwargs = target, args, kwargs
    node.meta["in_place"] = 0  # which argument keeps its dtype
    return args[0] if isinstance(args[0], fx.Node) else None


def _sharing(node: fx.Node, later: set[fx.Node], module: nn.Module) -> set[fx.Node]:
    """All but later nodes whose values may share memory with that of a node, itself among them."""
    found: set[fx.Node] = set()
    new = [node]
    while new:
        node = new.pop()
        if node not in found and node not in later:
            found.add(node)
            new += [user for user in node.users if not _is_fresh(user, module)]
            new += [] if _is_fresh(node, module) else node.all_input_nodes
    return found


def _is_fresh(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(module.get_submodule(node.target), WHOLE)
    if node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim"):
        return True
    return node.op in ("output", "placeholder", "get_attr") or _name(node.target) in _FRESH


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of a built-in function
        return {}
