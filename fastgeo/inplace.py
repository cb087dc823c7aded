"""In-place operations of a traced graph, made into ones that return a new value."""

import inspect
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

BATCH_NORM = nn.modules.batchnorm._BatchNorm


class InPlace(Exception):
    """Says in one sentence which operation must stay in place."""


# Names of operations that may return their first argument, or share its memory.
_VIEWS = set(
    """
    as_strided bfloat16 chunk contiguous detach diagonal double dropout expand expand_as
    flatten float getattr getitem half movedim narrow permute real reshape reshape_as select
    split squeeze swapaxes t tensor_split to transpose type type_as unbind unflatten unfold
    unsqueeze view view_as
    """.split()
)
_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


def without_in_place(node: fx.Node, module: nn.Module) -> None:
    """Make an in-place operation return a new value, which nothing can tell from the old one.

    Raises:
        InPlace: something can: the value is used again, or shares memory with one that may be.
    """
    if node.op not in ("call_function", "call_method"):
        return
    name, target, kwargs = _name(node.target), node.target, dict(node.kwargs)
    if node.op == "call_function" and "inplace" in _parameters(target):
        bound = inspect.signature(target).bind(*node.args, **kwargs).arguments
        if not bound.get("inplace"):
            return
        args, kwargs = (bound.pop(next(iter(bound))),), {**bound, "inplace": False}
    elif target in _OUT_OF_PLACE:
        target, args = _OUT_OF_PLACE[target], node.args
    elif name.endswith("_") and not name.endswith("__"):
        holder = torch if node.op == "call_function" else Tensor
        if not hasattr(holder, name[:-1]):
            raise InPlace(f"{node.format_node()} works in place")
        target = getattr(holder, name[:-1]) if node.op == "call_function" else name[:-1]
        args = node.args
    else:
        return
    changed = args[0]
    if isinstance(changed, fx.Node):
        fresh = changed.op in ("call_function", "call_method")
        fresh &= _name(changed.target) not in _VIEWS
        if changed.op == "call_module":
            fresh = isinstance(module.get_submodule(changed.target), BATCH_NORM)
        if not fresh or len(changed.users) > 1:
            raise InPlace(f"{node.format_node()} changes in place a value that is used again")
    node.target, node.args, node.kwargs = target, args, kwargs


def _name(target: Callable | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of a built-in function
        return {}
