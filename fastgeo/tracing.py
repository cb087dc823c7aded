"""The graph of a module: one trace, which stacking runs and from which symmetries are read.

Layers are traced through down to the functions that they call (`F.conv2d`, `F.layer_norm`, ...),
so a layer and its functional form are one thing. A submodule whose forward torch.fx cannot follow
is one node of the graph; the module itself must be traceable.
"""

import contextlib
import functools
import inspect
import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastgeo.values import no_fast_path

# One node each: their forward branches on their inputs, or they have state of their own.
BATCH_NORM = nn.modules.batchnorm._BatchNorm
WHOLE = (nn.MultiheadAttention, BATCH_NORM)


class TraceFailed(Exception):
    """Says in one sentence why a module has no graph."""


class Trace(NamedTuple):
    """What `trace` returns.

    Attributes:
        graph: a placeholder for each input, and get_attr nodes for parameters and buffers (by their
            first name, where they are tied) and for constants.
        constants: name -> tensors that the forward made of nothing else.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]


def trace(module: nn.Module, names: Sequence[str] | None = None) -> Trace:
    """The torch.fx graph of a module in its present mode (train or eval).

    Args:
        module: not changed.
        names: arguments of its forward that are inputs, by default the first one and those without
            a default value; the others keep theirs.

    Raises:
        TraceFailed: hooks, control flow that depends on the inputs, or a graph that would hold what
            must not be fixed once (functions of parameters, random numbers).
    """
    for name, layer in module.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            raise TraceFailed(f"{name or 'the module'} has a hook or a replaced forward")
    own = set(vars(module))
    random_states = random.getstate(), torch.get_rng_state()
    try:
        with _every_state_requires_grad(module), no_fast_path(), torch.enable_grad():
            graph = _Tracer(names).trace(module)
    except Exception as error:  # noqa: BLE001 - torch.fx raises whatever the user's forward raises
        raise TraceFailed(f"torch.fx cannot trace it: {_first_line(error)}") from error
    finally:
        constants = {name: vars(module).pop(name) for name in set(vars(module)) - own}
        drawn = random.getstate() != random_states[0]
        drawn |= not torch.equal(torch.get_rng_state(), random_states[1])
    if drawn:
        random.setstate(random_states[0])
        torch.set_rng_state(random_states[1])
        raise TraceFailed("its forward draws random numbers that do not depend on the inputs")
    if any(constant.requires_grad for constant in constants.values()):
        raise TraceFailed("its forward computes with parameters that it does not take by name")
    for node in graph.nodes:
        _out_of_place(node, module)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return Trace(graph, constants)


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


def _out_of_place(node: fx.Node, module: nn.Module) -> None:
    """Make an in-place operation return a new value, which nothing can tell from the old one.

    Raises:
        TraceFailed: something can: the value is used again, or shares memory with one that may be.
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
            raise TraceFailed(f"{node.format_node()} works in place")
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
            raise TraceFailed(f"{node.format_node()} changes in place a value that is used again")
    node.target, node.args, node.kwargs = target, args, kwargs


def _name(target: Callable | str) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _parameters(function: Callable) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except ValueError:  # of a built-in function
        return {}


def _encoder(
    self: nn.TransformerEncoder, src, mask=None, src_key_padding_mask=None, is_causal=None
):
    for layer in self.layers:
        src = layer(src, mask, src_key_padding_mask, bool(is_causal))
    return src if self.norm is None else self.norm(src)


def _encoder_layer(
    self: nn.TransformerEncoderLayer, src, src_mask=None, src_key_padding_mask=None, is_causal=False
):
    masks = (src_mask, src_key_padding_mask)
    if self.norm_first:
        src = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
        return src + self._ff_block(self.norm2(src))
    src = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
    return self.norm2(src + self._ff_block(src))


# What their forwards compute, without the branches on masks that choose kernels for inference.
PLAIN = {
    nn.TransformerEncoder.forward: _encoder,
    nn.TransformerEncoderLayer.forward: _encoder_layer,
}


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, names: Sequence[str] | None):
        super().__init__()
        self.names, self.first = names, True

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, WHOLE)

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        before = next(iter(reversed(self.graph.nodes)))
        if plain := PLAIN.get(type(module).forward):
            forward = functools.partial(plain, module)
        try:
            return super().call_module(module, forward, args, kwargs)
        except Exception:  # noqa: BLE001 - as in `trace`
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                if node.op != "get_attr":  # which torch.fx keeps for later uses
                    self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn: Any) -> Any:
        default = () if name.startswith("*") else sig.parameters[name].default
        given = name in self.names if self.names else self.first or default is sig.empty
        self.first = False
        if given:
            return self.create_proxy("placeholder", name, (), {})
        if default is sig.empty:
            raise TypeError(f"forward needs an input {name!r}")
        return default


@contextlib.contextmanager
def _every_state_requires_grad(module: nn.Module) -> Iterator[None]:
    """So that what a forward computes of parameters while it is traced can be told by its own."""
    state = [*module.parameters(), *module.buffers()]
    changed = [t for t in state if t.is_floating_point() and t.is_leaf and not t.requires_grad]
    for tensor in changed:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in changed:
            tensor.requires_grad_(False)


def _first_line(error: Exception) -> str:
    return f"{str(error) or type(error).__name__}".splitlines()[0]
