"""Any nn.Module as a function of stacked parameters: N networks in one pass.

The module is traced once (`fastgeo.tracing`) and its graph is run on stacked parameters: a
convolution becomes one with N groups, a linear layer a batched matrix product, and so on
(`fastgeo.operators`, `fastgeo.layers`). An operation that has no form of its own goes through
torch.func.vmap by itself; a module that cannot be traced goes through vmap as a whole, or else
through a loop.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastgeo import layers, operators
from fastgeo.fusion import fuse
from fastgeo.inputs import Inputs
from fastgeo.modes import batch_norms, refuse_batch_norm
from fastgeo.operators import RANDOM
from fastgeo.tracing import Trace, TraceFailed, trace
from fastgeo.values import NoForm, Stacked, any_stacked, by_loop, by_vmap, call, each, without_n

Parameters = Mapping[str, Tensor]
ENGINES = ("stacked", "vmap", "loop")
SHAPE_ATTRIBUTES = (("shape",), ("ndim",), ("dtype",), ("device",))
FUNCTIONS = operators.FUNCTIONS | layers.FUNCTIONS


class StackedModule:
    """What `stack` returns.

    Attributes:
        module: as it was given.
        engine: "stacked" where the traced graph runs on stacked parameters, else "vmap" or "loop".
        reason: why it is not "stacked", in one sentence; empty if it is, or was asked for.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        engine: str = "auto",
        channels_last: bool = False,
        batchnorm: str = "refuse",
    ):
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        if engine not in ("auto", *ENGINES):
            raise ValueError(f"engine must be auto, {', '.join(ENGINES)}, got {engine!r}")
        if batchnorm not in ("refuse", "recalibrate"):
            raise ValueError(f"batchnorm must be 'refuse' or 'recalibrate', got {batchnorm!r}")
        if batchnorm == "refuse":
            refuse_batch_norm(module)
        self.module, self.channels_last = module, channels_last
        self.engine, self.reason = engine, ""
        self._own = {
            name: (tensor, first)
            for named in (module.named_parameters, module.named_buffers)
            for name, tensor, first in _with_first_names(named(remove_duplicate=False))
        }
        self._batch_norms = batch_norms(module)
        self._unsafe_on_cpu = channels_last_is_unsafe(module)
        self._plans: dict[tuple, _Plan] = {}
        if engine in ("auto", "stacked"):
            try:
                self._plan(None)
                self.engine = "stacked"
            except TraceFailed as error:
                if engine == "stacked":
                    raise ValueError(
                        f"{type(module).__name__} cannot be stacked: {error}"
                    ) from error
                self.engine, self.reason = "vmap", str(error)
        self._may_change = engine == "auto"

    def __call__(self, params: Parameters, x: Inputs, *, per_point: bool = False) -> Tensor:
        """Evaluate N networks on inputs that they share, or on inputs of their own.

        Args:
            params: name -> [N, ...], parameters and buffers as in the module's `state_dict()` or
                `torch.func.stack_module_state`; buffers that are left out are the module's own.
            x: [B, ...], or [N, B, ...] if per_point; or a mapping of such tensors, the keyword
                arguments of the module's forward.
            per_point: whether each network has an input of its own.

        Returns:
            [N, B, ...] outputs; all tensors in what the module returns, if that is a tuple or dict.

        Raises:
            ValueError: params that are not of this module, or inputs of another N.
        """
        n, state = self._state(params)
        args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
        args, kwargs = pytree.tree_map(lambda t: self._input(t, n, per_point), (args, kwargs))
        statistics = {name: params[name].clone() for name in self._updated(params)}
        while True:
            try:
                return without_n(self._run(state, args, kwargs, n), n)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever vmap or the user's code raises
                if not self._may_change or self.engine == "loop":
                    raise
                for name, before in statistics.items():  # a pass that failed may have changed them
                    params[name].copy_(before)
                self._give_way(error)

    def explain(self) -> str:
        """A line for each operation: the layer it is in, which way it runs, and why."""
        title = f"{type(self.module).__name__}: engine {self.engine}"
        if self.engine != "stacked":
            return f"{title}; {self.reason}" if self.reason else title
        rows = list(next(reversed(self._plans.values())).rows())
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join([title, *lines])

    def _run(self, state: dict[str, Stacked], args: tuple, kwargs: dict, n: int) -> Any:
        if self.engine == "stacked":
            return self._plan(tuple(sorted(kwargs)) or None).run(state, args, kwargs, n)
        way = by_vmap if self.engine == "vmap" else by_loop
        return way(call(self.module), (state, args, kwargs), {}, n)

    def _updated(self, params: Parameters) -> list[str]:
        """The running statistics of BatchNorm among params that another engine may yet need."""
        if not self._may_change or self.engine == "loop":
            return []
        names = (
            f"{layer}.{own}".lstrip(".")
            for layer, batch_norm in self._batch_norms.items()
            if batch_norm.training
            for own, _ in batch_norm.named_buffers(recurse=False)
        )
        return [name for name in names if name in params]

    def _give_way(self, error: Exception) -> None:
        """Go on with the next engine; the loop raises what the module itself raises."""
        before, self.engine = self.engine, ENGINES[ENGINES.index(self.engine) + 1]
        self.reason = f"{before} failed: {(str(error) or type(error).__name__).splitlines()[0]}"
        warnings.warn(
            f"{type(self.module).__name__} runs as {self.engine}; {self.reason}", stacklevel=4
        )

    def _plan(self, names: tuple[str, ...] | None) -> "_Plan":
        """The graph for these inputs in the present modes of all layers."""
        key = (names, tuple(layer.training for layer in self.module.modules()))
        if key not in self._plans:
            traced = trace(self.module, names)
            fuse(traced.graph)
            self._plans[key] = _Plan(self.module, traced)
        return self._plans[key]

    def _state(self, params: Parameters) -> tuple[int, dict[str, Stacked]]:
        """N, and all parameters and the given buffers under all of their names."""
        if not params:
            raise ValueError("params must hold the module's parameters, got none")
        n = len(next(iter(params.values())))
        for name in params:
            if name not in self._own:
                raise ValueError(f"params hold {name}, which the module does not have")
        state = {}
        for name, (tensor, first) in self._own.items():
            given = params.get(first, params.get(name))
            if given is not None:
                if given.shape != (n, *tensor.shape):
                    shape = ", ".join(map(str, ("N", *tensor.shape)))
                    raise ValueError(
                        f"{name} must be [{shape}] with N = {n}, got {list(given.shape)}"
                    )
                state[name] = Stacked(given)
            elif isinstance(tensor, nn.Parameter):
                raise ValueError(f"params lack {name}")
        return n, state

    def _input(self, x: Any, n: int, per_point: bool) -> Any:
        if not isinstance(x, Tensor):
            return x
        if per_point and len(x) != n:
            raise ValueError(f"x must be [N, B, ...] with N = {n}, got {list(x.shape)}")
        if x.ndim == 4 + per_point and (self.channels_last or not x.is_cuda):
            last = self.channels_last and (x.is_cuda or not self._unsafe_on_cpu)
            images = x.transpose(0, 1).flatten(1, 2) if per_point else x
            if last:
                images = images.contiguous(memory_format=torch.channels_last)
            else:  # of one channel, too, whose strides may else be those of channels-last
                images = images.contiguous().flatten().view(images.shape)
            x = images.unflatten(1, (n, -1)).transpose(0, 1) if per_point else images
        return Stacked(x) if per_point else x


class _Plan:
    """A traced graph, and which way each of its operations runs."""

    def __init__(self, module: nn.Module, traced: Trace):
        self.module, self.traced = module, traced
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

    def __init__(self, plan: _Plan, state: dict[str, Stacked], n: int):
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
        if node.op == "call_module":
            prefix = f"{node.target}."
            layer = self.module.get_submodule(node.target)
            names = (name.removeprefix(prefix) for name in self.state if name.startswith(prefix))
            own = {name: self.state[prefix + name] for name in names}
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


def _with_first_names(named: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, str]]:
    """(name, tensor, first name of the same tensor): tied parameters have several names."""
    first: dict[Tensor, str] = {}
    for name, tensor in named:
        yield name, tensor, first.setdefault(tensor, name)


def channels_last_is_unsafe(module: nn.Module) -> bool:
    """Whether oneDNN, on this CPU, gets the gradient of one of the convolutions wrong.

    In channels-last the weight gradient of a strided 1x1 convolution of fewer input channels than a
    vector register holds overruns a buffer (uxlfoundation/oneDNN issue 6035, seen in torch 2.14.1).
    """
    vector = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    return any(
        max(layer.kernel_size) == 1
        and max(layer.stride) > 1
        and layer.groups == 1
        and layer.in_channels < vector
        for layer in module.modules()
        if isinstance(layer, nn.Conv2d)
    )


def part_of(params: Parameters, part: slice) -> dict[str, Tensor]:
    """Some of the networks; without a copy, and without a trace where they are all."""
    n = len(next(iter(params.values())))
    if part == slice(0, n):
        return dict(params)
    return {name: tensor[part] for name, tensor in params.items()}


def stack(
    module: nn.Module,
    *,
    engine: str = "auto",
    channels_last: bool = False,
    batchnorm: str = "refuse",
) -> StackedModule:
    """The module as a function of N networks' stacked parameters: `(params, x) -> [N, B, ...]`.

    Equivalent to::

        torch.stack([functionalcall(module, {k: v[i] for k, v in params.items()}, x)
                     for i in range(N)])

    Dropout draws for each network by itself; in train mode BatchNorm updates the running statistics
    in params in place, as it would a network's own.

    Args:
        module: any nn.Module, run in train or eval mode as it is; it is not changed, and its own
            parameter values are not used. Hooks that are added later are not seen.
        engine: "stacked" is the traced graph, "vmap" torch.func.vmap of the whole module, "loop"
            one network after the other; "auto" the first of them that works. Those who want the
            fastest give "auto" to `fastgeo.optimize` and `fastgeo.evaluate`, which measure.
        channels_last: give the module its images [B, C, H, W] in channels-last memory format; not
            on a CPU where `channels_last_is_unsafe`.
        batchnorm: "refuse", or "recalibrate" for a module with BatchNorm, whose statistics are then
            buffers of each network like any other; see `fastgeo.recalibrate`.

    Raises:
        TypeError: anything else.
        ValueError: a module with BatchNorm, or one that cannot be traced if engine is "stacked".

    Example:
        >>> nets = [resnet(8, 0.5) for _ in range(3)]
        >>> params, _ = torch.func.stack_module_state(nets)
        >>> stack(nets[0])(params, torch.randn(5, 3, 32, 32)).shape
        torch.Size([3, 5, 10])
    """
    return StackedModule(module, engine=engine, channels_last=channels_last, batchnorm=batchnorm)
