"""A traced graph run on stacked values, each operation in the way that its arguments allow."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastgeo import layers, operators
from fastgeo.operators import RANDOM
from fastgeo.precision import Casts
from fastgeo.tracing import Trace
from fastgeo.values import NoForm, Stacked, any_stacked, by_loop, by_vmap, call, each

SHAPE_ATTRIBUTES = (("shape",), ("ndim",), ("dtype",), ("device",))
FUNCTIONS = operators.FUNCTIONS | layers.FUNCTIONS


class Plan:
    """A traced graph, and which way each of its operations runs."""

    def __init__(self, module: nn.Module, traced: Trace, half: bool):
        self.module, self.traced = module, traced
        self.casts = Casts(traced.graph, traced.constants) if half else None
        self.ways: dict[fx.Node, Callable] = {}
        self.reasons: dict[fx.Node, str] = {}
        for node in traced.graph.nodes:
            if node.op in ("call_function", "call_method", "call_module"):
                self.ways[node], self.reasons[node] = self._way(node)

    def run(self, state: dict[str, Stacked], args: tuple, kwargs: dict, n: int) -> Any:
        names = [node.target for node in self.traced.graph.nodes if node.op == "placeholder"]
        named = [kwargs[name] for name in names] if kwargs else args
        return _Run(self, state, n).run(*named)

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(layer, operation, way) of each operation."""
        shared = set()  # does not depend on which network it is
        for node in self.traced.graph.nodes:
            if node.op == "placeholder" or node.target in self.traced.constants:
                shared.add(node)
            if node not in self.ways:
                continue
            way = "stacked"
            if reason := self.reasons[node]:
                way = f"{self.ways[node].__name__.removeprefix('by_')}: {reason}"
            own_draw = node.op == "call_module" or node.target in RANDOM
            of_shape = node.target in ("size", "dim") or node.args[1:] in SHAPE_ATTRIBUTES
            if of_shape or (not own_draw and shared.issuperset(node.all_input_nodes)):
                shared.add(node)
                way = "once for all networks"
            layers = list(node.meta.get("nn_module_stack", {}))
            yield layers[-1] if layers else "", node.name, way

    def _way(self, node: fx.Node) -> tuple[Callable, str]:
        """The function (n, node's arguments) that runs a node, and why it is not a stacked form."""
        if node.op == "call_module":
            layer = self.module.get_submodule(node.target)
            handler, given = layers.MODULES.get(type(layer)), (0, layer, {})
        else:
            handler, given = FUNCTIONS.get(node.target), (0,)
        if handler is None:
            return by_vmap, "it has no stacked form"
        try:
            inspect.signature(handler).bind(*given, *node.args, **node.kwargs)
        except TypeError as error:
            return by_vmap, f"its stacked form has {error}"
        return handler, ""


class _Run(fx.Interpreter):
    """One pass of the traced graph over stacked parameters."""

    def __init__(self, plan: Plan, state: dict[str, Stacked], n: int):
        super().__init__(plan.module, graph=plan.traced.graph)
        self.plan, self.state, self.n = plan, state, n
        self.extra_traceback = False  # leave the exceptions of the layers as they are

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        for known in (self.state, self.plan.traced.constants):
            if target in known:
                return known[target]
        return super().get_attr(target, args, kwargs)

    def run_node(self, node: fx.Node) -> Any:
        if node not in self.plan.ways:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        if self.plan.casts is not None:
            args, kwargs = self.plan.casts(node, (args, kwargs))
        if node.op == "call_module":
            prefix = f"{node.target}."
            layer = self.module.get_submodule(node.target)
            names = (name.removeprefix(prefix) for name in self.state if name.startswith(prefix))
            own = {name: self.state[prefix + name] for name in names}
            own = own if self.plan.casts is None else self.plan.casts(node, own)
            function, args, own_args = call(layer), (own, args, kwargs), (layer, own, *args)
            own_kwargs, kwargs = kwargs, {}
        else:
            function = node.target if callable(node.target) else _method(node.target)
            own_args, own_kwargs = args, kwargs
            random = node.target in RANDOM
            if not random and not any_stacked(args) and not any_stacked(kwargs):
                return function(*args, **kwargs)
            if random and self.plan.ways[node] is by_vmap:
                args, kwargs = pytree.tree_map(self._own_copy, (args, kwargs))
        way = self.plan.ways[node]
        if way not in (by_vmap, by_loop):
            try:
                return way(self.n, *own_args, **own_kwargs)
            except NoForm as error:
                way = self.plan.ways[node] = error.way
                self.plan.reasons[node] = str(error)
        try:
            return way(function, args, kwargs, self.n)
        except RuntimeError as error:
            if way is by_loop:
                raise
            out = by_loop(function, args, kwargs, self.n)
            self.plan.ways[node] = by_loop
            self.plan.reasons[node] = f"vmap failed: {str(error).splitlines()[0]}"
            return out

    def _own_copy(self, value: Any) -> Any:
        return Stacked(each(value, self.n).clone()) if isinstance(value, Tensor) else value


def _method(name: str) -> Callable:
    return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)
