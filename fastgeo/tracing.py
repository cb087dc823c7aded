"""The graph of a module: one trace, which stacking runs and from which symmetries are read.

Layers are traced through down to the functions that they call (`F.conv2d`, `F.layer_norm`, ...),
so a layer and its functional form are one thing. A submodule whose forward torch.fx cannot follow
is one node of the graph; the module itself must be traceable.
"""

import contextlib
import functools
import inspect
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fastgeo.attributes import Attributes
from fastgeo.inplace import OUT_OF_PLACE, WHOLE, InPlace, without_in_place
from fastgeo.transformer import PLAIN
from fastgeo.values import first_line, no_fast_path


class TraceFailed(Exception):
    """Says in one sentence why a module has no graph, and which engine may evaluate it instead."""

    def __init__(self, reason: str, engine: str = "vmap"):
        super().__init__(reason)
        self.engine = engine


class Trace(NamedTuple):
    """What `trace` returns.

    Attributes:
        graph: a placeholder for each input, and get_attr nodes for parameters and buffers (by their
            first name, where they are tied) and for constants.
        constants: name -> tensors that the forward made of nothing else.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]


def trace(
    module: nn.Module, names: Collection[str] | None = None, fixed: Mapping[str, Any] | None = None
) -> Trace:
    """The torch.fx graph of a module in its present mode (train or eval).

    Args:
        module: not changed.
        names: arguments of its forward that are inputs, by default the first one and those without
            a default value; the others keep theirs.
        fixed: values of other arguments, for which alone the graph is.

    Raises:
        TraceFailed: hooks, control flow that depends on the inputs, or a graph that would hold what
            must not be fixed once (functions of parameters, random numbers).
    """
    for name, layer in module.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            raise TraceFailed(f"{name or 'the module'} has a hook or a replaced forward")
    attributes = Attributes(module)
    random_states = random.getstate(), torch.get_rng_state()
    try:
        with (
            _every_state_requires_grad(module),
            _no_autograd_functions(),
            no_fast_path(),
            torch.enable_grad(),
        ):
            graph = _Tracer(names, fixed or {}).trace(module)
    except Exception as error:  # noqa: BLE001 - torch.fx raises whatever the user's forward raises
        raise TraceFailed(f"torch.fx cannot trace it: {first_line(error)}") from error
    finally:
        assigned = attributes.restore()
        drawn = random.getstate() != random_states[0]
        drawn |= not torch.equal(torch.get_rng_state(), random_states[1])
    constants = {name: assigned.pop(name) for name in [*assigned] if _is_constant(name)}
    if assigned:
        raise TraceFailed(f"its forward assigns {next(iter(assigned))}")
    if drawn:
        random.setstate(random_states[0])
        torch.set_rng_state(random_states[1])
        raise TraceFailed("its forward draws random numbers that do not depend on the inputs")
    if any(constant.requires_grad for constant in constants.values()):
        raise TraceFailed("its forward computes with parameters that it does not take by name")
    for name in {*(names or ()), *(fixed or ())} - inspect.signature(
        module.forward
    ).parameters.keys():
        raise TraceFailed(f"its forward has no argument {name!r}")
    try:
        without_in_place(graph, module)
    except InPlace as error:  # and in vmap the strides are others, so that other views are copies
        raise TraceFailed(str(error), "loop") from error
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return Trace(graph, constants)


class _Strict:
    """What torch.fx would record wrongly: `y += 1` as `y = y + 1`, and `y.data = z` not at all."""

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad"):
            raise TraceFailed(f"its forward assigns to .{name}")
        super().__setattr__(name, value)


class _Proxy(_Strict, fx.Proxy):
    _is_param = False  # asked for by isinstance(..., nn.Parameter)

    @property
    def __class__(self) -> type:
        """For isinstance: inputs and what the module holds are tensors, the rest is not known."""
        return Tensor if self.node.op in ("placeholder", "get_attr") else type(self)


class _Attribute(_Strict, fx.proxy.Attribute):
    pass


def _recorded(function: Callable) -> Callable:
    return lambda self, other: self.tracer.create_proxy(
        "call_function", function, (self, other), {}
    )


for _in_place in OUT_OF_PLACE:
    setattr(_Strict, f"__{_in_place.__name__}__", _recorded(_in_place))


def _modes() -> tuple:
    """What a graph does not record, though it decides what operations compute."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _no_autograd_functions() -> Iterator[None]:
    """Refuse torch.autograd.Function, whose backward a graph of its forward does not have."""
    context = torch.autograd.function.BackwardCFunction  # of which every call makes one

    def refuse(self: Any) -> None:
        raise TraceFailed("its forward has a backward of its own")

    context.__init__ = refuse
    try:
        yield
    finally:
        del context.__init__


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, names: Collection[str] | None, fixed: Mapping[str, Any]):
        super().__init__()
        self.names, self.fixed, self.first, self.modes = names, fixed, True, _modes()

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            raise TraceFailed("its forward switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        return a.node if issubclass(type(a), fx.Proxy) else super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, WHOLE)

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        before = next(iter(reversed(self.graph.nodes)))
        attributes, around = Attributes(module), self.module_stack.copy()
        if plain := PLAIN.get(type(module).forward):
            forward = functools.partial(plain, module)
        try:
            outputs = super().call_module(module, forward, args, kwargs)
            if assigned := attributes.restore():
                raise TraceFailed(f"its forward assigns {next(iter(assigned))}")
            return outputs
        except Exception:  # noqa: BLE001 - as in `trace`
            attributes.restore()
            self.module_stack = around  # on which torch.fx leaves the module that failed
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                if node.op != "get_attr":  # which torch.fx keeps for later uses
                    self.graph.erase_node(node)
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)

    def _proxy_placeholder(self, name: str, concrete_args: Any, sig: Any, fn: Any) -> Any:
        default = () if name.startswith("*") else sig.parameters[name].default
        if name in self.fixed:
            return self.fixed[name]
        given = self.first or default is sig.empty if self.names is None else name in self.names
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


def _is_constant(name: Any) -> bool:
    """Whether torch.fx gave the module an attribute of that name, for a tensor of the graph."""
    return isinstance(name, str) and name.startswith("_tensor_constant")
