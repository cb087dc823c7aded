"""The graph of a module: one trace, which stacking runs and from which symmetries are read.

Layers are traced through down to the functions that they call (`F.conv2d`, `F.layer_norm`, ...),
so a layer and its functional form are one thing. A submodule whose forward torch.fx cannot follow
is one node of the graph; the module itself must be traceable.
"""

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

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
        TraceFailed: hooks, control flow that depends on the inputs or on whether gradients are
            enabled, or a graph that would hold what must not be fixed once (functions of
            parameters, random numbers).
    """
    for name, layer in module.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            raise TraceFailed(f"{name or 'the module'} has a hook or a replaced forward")
    random_states = random.getstate(), torch.get_rng_state()
    try:
        tracer = _Tracer(names, fixed or {})
        graph, constants = tracer.record(module)
        if any(constant.requires_grad for constant in constants.values()):
            raise TraceFailed("its forward computes with parameters that it does not take by name")
        with torch.no_grad():
            again, the_same = _Tracer(names, fixed or {}, tracer.whole).record(module)
    finally:
        drawn = random.getstate() != random_states[0]
        drawn |= not torch.equal(torch.get_rng_state(), random_states[1])
        random.setstate(random_states[0])
        torch.set_rng_state(random_states[1])
    if drawn:
        raise TraceFailed("its forward draws random numbers that do not depend on the inputs")
    if _described(graph) != _described(again) or not _equal(constants, the_same):
        raise TraceFailed("its forward is another one where gradients are not enabled")
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


def _described(graph: fx.Graph) -> list[tuple]:
    """What a graph computes, whatever its nodes are called."""
    names = {node: f"%{i}" for i, node in enumerate(n for n in graph.nodes if n.op != "get_attr")}
    names |= {node: node.target for node in graph.nodes if node.op == "get_attr"}
    return [
        (n.op, n.target, repr(fx.map_arg((n.args, n.kwargs), lambda node: names[node])))
        for n in graph.nodes
        if n.op != "get_attr"
    ]


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[name], b[name], rtol=0, atol=0, equal_nan=True) for name in a
    )


class _Strict:
    """What torch.fx would record wrongly: `y += 1` as `y = y + 1`, and `y.data = z` not at all."""

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "grad", "requires_grad"):
            self.tracer.refuse(f"its forward assigns to .{name}", engine="loop")
        super().__setattr__(name, value)


# Fields of what functions of torch and torch.linalg return.
OF_NAMED_TUPLES = set(
    """
    L LU P Q R S U V Vh X eigenvalues eigenvectors exponent info inverse_indices logabsdet mantissa
    pivots rank residuals sign singular_values solution
    """.split()
)


class _Proxy(_Strict, fx.Proxy):
    _is_param = False  # asked for by isinstance(..., nn.Parameter)

    def __getattr__(self, name: str) -> fx.Proxy:
        known = hasattr(Tensor, name) or name in OF_NAMED_TUPLES
        if not known and self.node.op != "call_module":
            error = AttributeError(f"a tensor has no attribute {name!r}")
            if self.node.op not in ("placeholder", "get_attr"):  # it may be something else
                self.tracer.refused = error
            raise error
        return super().__getattr__(name)

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


def _refused(name: str) -> Callable:
    return lambda self, *_: self.tracer.refuse(f"its forward asks for {name}() of a tensor")


for _name in "int float complex index array".split():
    setattr(_Strict, f"__{_name}__", _refused(_name))


def _length(self: _Strict) -> NoReturn:
    if "len" in sys._getframe(1).f_code.co_names:
        self.tracer.refuse("its forward asks for len() of a tensor")
    raise TypeError("the length of a value is not known")  # an index that it is in goes on


_Strict.__len__ = _length


def _modes() -> tuple:
    """What a graph does not record, though it decides what operations compute."""
    autocast = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _no_autograd_functions(tracer: "_Tracer") -> Iterator[None]:
    """Refuse torch.autograd.Function, whose backward a graph of its forward does not have."""
    context = torch.autograd.function.BackwardCFunction  # of which every call makes one
    context.__init__ = lambda self: tracer.refuse("its forward has a backward of its own")
    try:
        yield
    finally:
        del context.__init__


SETS_HOOKS = (
    "register_hook",
    "register_post_accumulate_grad_hook",
    "requires_grad_",
    "retain_grad",
)


class _Tracer(fx.Tracer):
    """Records a forward, strictly.

    Attributes:
        refused: the last error for which there is no graph, also where the forward caught it.
        whole: names of the submodules that are one node each, because they cannot be traced.
    """

    proxy_buffer_attributes = True

    def __init__(
        self,
        names: Collection[str] | None,
        fixed: Mapping[str, Any],
        whole: Collection[str] = (),
    ):
        super().__init__()
        self.names, self.fixed, self.first, self.modes = names, fixed, True, _modes()
        self.refused: Exception | None = None
        self.whole = set(whole)

    def record(self, module: nn.Module) -> tuple[fx.Graph, dict[str, Tensor]]:
        """The graph and its constants."""
        attributes = Attributes(module)
        try:
            with _every_state_requires_grad(module), _no_autograd_functions(self), no_fast_path():
                graph = self.trace(module)
        except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
            self.refused = error
        finally:
            assigned = attributes.restore()
        if error := self.refused:
            engine = error.engine if isinstance(error, TraceFailed) else "vmap"
            raise TraceFailed(f"torch.fx cannot trace it: {first_line(error)}", engine) from error
        constants = {name: assigned.pop(name) for name in [*assigned] if _is_constant(name)}
        if assigned:
            raise TraceFailed(f"its forward assigns {next(iter(assigned))}")
        return graph, constants

    def refuse(self, reason: str, *, engine: str = "vmap") -> NoReturn:
        self.refused = TraceFailed(reason, engine)
        raise self.refused

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self.modes:
            self.refuse("its forward switches gradients or autocast")
        if kind == "call_method" and target in SETS_HOOKS:
            self.refuse(f"its forward calls {target}", engine="loop")
        return super().create_node(kind, target, *args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        return self._or_refuse(super().create_arg, a)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._or_refuse(super().to_bool, obj)

    def iter(self, obj: fx.Proxy) -> Iterator:
        return self._or_refuse(super().iter, obj)

    def path_of_module(self, mod: nn.Module) -> str:
        return self._or_refuse(super().path_of_module, mod)

    def _or_refuse(self, function: Callable, of: Any) -> Any:
        try:
            return function(of)
        except Exception as error:
            self.refused = error
            raise

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, WHOLE)

    def call_module(self, module: nn.Module, forward: Any, args: tuple, kwargs: dict) -> Any:
        name = self.path_of_module(module)
        if name in self.whole:
            return self.create_proxy("call_module", name, args, kwargs)
        before = next(iter(reversed(self.graph.nodes)))
        attributes, around, refused = Attributes(module), self.module_stack.copy(), self.refused
        if plain := PLAIN.get(type(module).forward):
            forward = functools.partial(plain, module)
        try:
            outputs = super().call_module(module, forward, args, kwargs)
            if assigned := attributes.restore():
                raise TraceFailed(f"its forward assigns {next(iter(assigned))}")
            if self.refused is not refused:
                raise self.refused
            return outputs
        except Exception as error:  # noqa: BLE001 - as in `trace`
            attributes.restore()
            self.refused = refused
            self.module_stack = around  # on which torch.fx leaves the module that failed
            for node in reversed(self.graph.nodes):
                if node is before:
                    break
                if node.op != "get_attr":  # which torch.fx keeps for later uses
                    self.graph.erase_node(node)
            self.whole.add(name)
            whole = self.create_proxy("call_module", name, args, kwargs)
            if isinstance(error, TraceFailed) and error.engine == "loop":
                whole.node.meta["loop"] = str(error)
            return whole

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
