"""The traced graph of a module, run on stacked values: which way each operation goes, and why."""

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastgeo import layers, operators
from fastgeo.attributes import unchanged
from fastgeo.operators import RANDOM
from fastgeo.precision import Casts
from fastgeo.tracing import Trace, TraceFailed
from fastgeo.values import (
    NoForm,
    Stacked,
    any_stacked,
    by_loop,
    by_vmap,
    call,
    each,
    first_line,
    own_buffers,
    refused_in_place,
    tensors_in,
    undone_on_failure,
)

SHAPE_ATTRIBUTES = (("shape",), ("ndim",), ("dtype",), ("device",))
FUNCTIONS = operators.FUNCTIONS | layers.FUNCTIONS


class Plan:
    """A traced graph, and which way each of its operations runs."""

    def __init__(self, module: nn.Module, traced: Trace, half: bool):
        self.module, self.traced = module, traced
        self.casts = Casts(traced.graph, traced.constants) if half else None
        self.ways: dict[fx.Node, Callable] = {}
        self.reasons: dict[fx.Node, str] = {}
        self.own_inputs: set[str] = set()  # those that differ between the networks, in the last run
        for node in traced.graph.nodes:
            if node.op in ("call_function", "call_method", "call_module"):
                self.ways[node], self.reasons[node] = self._way(node)

    def run(self, state: dict[str, Stacked | Tensor], args: tuple, kwargs: dict, n: int) -> Any:
        """What the module returns for these inputs, of the networks with this state.

        A way that fails is left for good, but not where all that are left fail, too: that is the
        inputs' fault.
        """
        names = [node.target for node in self.traced.graph.nodes if node.op == "placeholder"]
        named = [kwargs[name] for name in names] if kwargs else args
        if len(named) < len(names):
            raise TypeError(
                f"the module's forward needs {', '.join(names)}; give a mapping of them as inputs"
            )
        self.own_inputs = {
            name for name, x in zip(names, named, strict=False) if isinstance(x, Stacked)
        }
        before = dict(self.ways), dict(self.reasons)
        run = _Run(self, state, n)
        try:
            outputs = run.run(*named)
        except Exception:
            self.ways, self.reasons = before
            raise
        for node in run.failed:
            warnings.warn(f"{node.name} runs through vmap: {self.reasons[node]}", stacklevel=4)
        return outputs

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """(layer, operation, way) of each operation."""
        shared = set()  # does not depend on which network it is
        for node in self.traced.graph.nodes:
            of_all = node.op == "placeholder" and node.target not in self.own_inputs
            if of_all or node.target in self.traced.constants:
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
            around = list(node.meta.get("nn_module_stack", {}))
            if node.op == "call_module":
                around.append(node.target)
            yield around[-1] if around else "", node.name, way

    def _way(self, node: fx.Node) -> tuple[Callable, str]:
        """The function (n, node's arguments) that runs a node, and why it is not a stacked form."""
        if reason := node.meta.get("loop"):
            return by_loop, reason
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

    def __init__(self, plan: Plan, state: dict[str, Stacked | Tensor], n: int):
        super().__init__(plan.module, graph=plan.traced.graph)
        self.plan, self.state, self.n = plan, state, n
        self.failed: list[fx.Node] = []  # whose stacked forms raised
        self.extra_traceback = False  # leave the exceptions of the layers as they are

    def get_attr(self, target: str, args: tuple, kwargs: dict) -> Any:
        for known in (self.state, self.plan.traced.constants):
            if target in known:
                return known[target]
        return super().get_attr(target, args, kwargs)

    def run_node(self, node: fx.Node) -> Any:
        if node not in self.plan.ways:
            return super().run_node(node)
        args, kwargs = self._cast(node, self.fetch_args_kwargs_from_env(node))
        out = self._operation(node, args, kwargs)
        if "in_place" in node.meta:
            _check_in_place(node, args[node.meta["in_place"]], out)
        return out

    def _operation(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        function = node.target if callable(node.target) else _method(node.target)
        random = node.target in RANDOM
        if not random and not any_stacked(args) and not any_stacked(kwargs):
            return function(*args, **kwargs)
        out, done = self._stacked(node, args, kwargs)
        if done:
            return out
        if random:
            args, kwargs = pytree.tree_map(self._own_copy, (args, kwargs))
        return self._one_by_one(node, function, args, kwargs)

    def _cast(self, node: fx.Node, value: Any) -> Any:
        """In the dtype that the node runs in."""
        return value if self.plan.casts is None else self.plan.casts(node, value)

    def _module(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        """A submodule that is one operation."""
        layer, prefix = self.module.get_submodule(node.target), f"{node.target}."
        names = (name.removeprefix(prefix) for name in self.state if name.startswith(prefix))
        own = own_buffers(layer, self.n) | {name: self.state[prefix + name] for name in names}
        own = self._cast(node, own)
        out, done = self._stacked(node, (layer, own, *args), kwargs)
        if done:
            return out
        buffers = [own[name].tensor for name in _updated(layer) if isinstance(own[name], Stacked)]
        with unchanged(layer), refused_in_place(tensors_in((args, kwargs))):
            return self._one_by_one(node, call(layer), (own, args, kwargs), {}, buffers)

    def _stacked(self, node: fx.Node, args: tuple, kwargs: dict) -> tuple[Any, bool]:
        """What the stacked form returns, and whether there is one for these arguments."""
        form = self.plan.ways[node]
        if form in (by_vmap, by_loop):
            return None, False
        try:
            return form(self.n, *args, **kwargs), True
        except (torch.OutOfMemoryError, IndexError):  # vmap would read another network's row
            raise
        except NoForm as error:
            self.plan.ways[node], self.plan.reasons[node] = error.way, str(error)
        except Exception as error:  # noqa: BLE001 - whatever torch raises
            self.plan.ways[node] = by_vmap
            self.plan.reasons[node] = f"its stacked form failed: {first_line(error)}"
            self.failed.append(node)
        return None, False

    def _one_by_one(
        self, node: fx.Node, function: Callable, args: tuple, kwargs: dict, buffers: Sequence = ()
    ) -> Any:
        """Through vmap, or where that fails in a loop, with these buffers as they were before."""
        if self.plan.ways[node] is by_vmap:
            try:
                with undone_on_failure(buffers):
                    return by_vmap(function, args, kwargs, self.n)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - as in `_stacked`
                self.plan.ways[node] = by_loop
                self.plan.reasons[node] = f"vmap failed: {first_line(error)}"
        return by_loop(function, args, kwargs, self.n)

    def _own_copy(self, value: Any) -> Any:
        return Stacked(each(value, self.n).clone()) if isinstance(value, Tensor) else value


def _check_in_place(node: fx.Node, changed: Any, out: Any) -> None:
    """An operation that was in place keeps the dtype and shape of a tensor it changes, or raises.

    Numbers, as of a shape, are new ones after `n += 1` in Python, too.
    """
    if not isinstance(changed, Stacked | Tensor):
        return
    (before, shape), (after, new_shape) = (
        (v.tensor.dtype, v.tensor.shape[1:]) if isinstance(v, Stacked) else (v.dtype, v.shape)
        for v in (changed, out)
    )
    if (before, shape) != (after, new_shape):
        raise TraceFailed(f"{node.name} is in place, and would make {before} {after}")


def _method(name: str) -> Callable:
    return lambda self, *args, **kwargs: getattr(self, name)(*args, **kwargs)


def _updated(layer: nn.Module) -> list[str]:
    """The buffers that a layer may change."""
    return [name for name, _ in layer.named_buffers()] if layer.training else []
