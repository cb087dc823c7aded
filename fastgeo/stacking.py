"""Any nn.Module as a function of stacked parameters: N networks in one pass.

The module is traced once with torch.fx and its graph is run on stacked parameters: a convolution
becomes one with N groups, a linear layer a batched matrix product, GroupNorm one with N times the
groups, and elementwise operations stay as they are. A module with a node that is not in `LAYERS` or
`FUNCTIONS` below, used in a way that they do not cover, or one that cannot be traced, goes through
torch.func.vmap as a whole.

Inside, every value is [N, B, ...]; what all networks share has stride 0 along N.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    stacked_conv2d,
    stacked_group_norm,
    stacked_layer_norm,
    stacked_linear,
)
from torch import Tensor, fx, nn
from torch.func import functional_call

from fastgeo.models import ChannelNorm

Parameters = Mapping[str, Tensor]


def _conv2d(layer: nn.Conv2d, p: Parameters, input: Tensor) -> Tensor:
    return stacked_conv2d(
        input, p["weight"], p.get("bias"), layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _linear(layer: nn.Linear, p: Parameters, input: Tensor) -> Tensor:
    return stacked_linear(input, p["weight"], p.get("bias"))


def _group_norm(layer: nn.GroupNorm, p: Parameters, input: Tensor) -> Tensor:
    return stacked_group_norm(input, layer.num_groups, p.get("weight"), p.get("bias"), layer.eps)


def _channel_norm(layer: ChannelNorm, p: Parameters, input: Tensor) -> Tensor:
    pixels = input.permute(0, 1, 3, 4, 2)  # [N, B, H, W, C]
    out = stacked_layer_norm(pixels, p.get("weight"), p.get("bias"), layer.eps)
    return out.permute(0, 1, 4, 2, 3)


def _flatten(input: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    return input.flatten(_behind_n(start_dim), _behind_n(end_dim))


def _mean(input: Tensor, dim: int | tuple[int, ...] | None = None, keepdim: bool = False) -> Tensor:
    dims = (dim,) if isinstance(dim, int) else dim or range(input.ndim - 1)
    return input.mean([_behind_n(d) for d in dims], keepdim)


def _add(input: Tensor | float, other: Tensor | float) -> Tensor:
    """The sum, broadcast behind N as it would be without N."""
    terms = [input, other]
    if isinstance(input, Tensor) and isinstance(other, Tensor):
        rank = max(input.ndim, other.ndim)
        terms = [t.reshape(len(t), *(1,) * (rank - t.ndim), *t.shape[1:]) for t in terms]
    return terms[0] + terms[1]


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu(input)


def _behind_n(dim: int) -> int:
    """A dimension of [B, ...] as one of [N, B, ...]."""
    return dim + 1 if dim >= 0 else dim


LAYERS: dict[type[nn.Module], Callable] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    ChannelNorm: _channel_norm,
    nn.ReLU: lambda layer, p, input: F.relu(input),
    nn.Flatten: lambda layer, p, input: _flatten(input, layer.start_dim, layer.end_dim),
    nn.Identity: lambda layer, p, input: input,
}
FUNCTIONS: dict[Callable | str, Callable] = {
    F.relu: _relu,
    torch.relu: _relu,
    "relu": _relu,
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    torch.flatten: _flatten,
    "flatten": _flatten,
    torch.mean: _mean,
    "mean": _mean,
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return type(module) in LAYERS or super().is_leaf_module(module, qualified_name)


class _Run(fx.Interpreter):
    """One pass of the traced graph over stacked parameters."""

    def __init__(self, graph_module: fx.GraphModule, params: Parameters):
        super().__init__(graph_module)
        self.params = params
        self.extra_traceback = False  # leave the exceptions of the layers as they are

    def call_module(self, target: str, args: tuple, kwargs: dict) -> Tensor:
        layer = self.fetch_attr(target)
        names = (name for name, _ in layer.named_parameters(recurse=False))
        own = {name: self.params[f"{target}.{name}"] for name in names}
        return LAYERS[type(layer)](layer, own, *args, **kwargs)

    def call_function(self, target: Callable, args: tuple, kwargs: dict) -> Tensor:
        return FUNCTIONS[target](*args, **kwargs)

    call_method = call_function


class StackedModule:
    """What `stack` returns.

    Attributes:
        engine: "stacked" where the traced graph runs on stacked parameters, "vmap" otherwise.
        reason: why it is vmap, in one sentence; empty for "stacked".
    """

    def __init__(self, module: nn.Module):
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
        refuse_batch_norm(module)
        self.module = module
        self.graph_module, self.reason = _trace(module)
        self.engine = "vmap" if self.graph_module is None else "stacked"

    def __call__(self, params: Parameters, x: Tensor, *, per_point: bool = False) -> Tensor:
        """Evaluate N networks on inputs that they share, or on inputs of their own.

        Args:
            params: name -> [N, ...], parameters and buffers as in the module's `state_dict()`.
            x: [B, ...], or [N, B, ...] if per_point.
            per_point: whether each network has an input of its own.

        Returns:
            [N, B, ...] outputs.
        """
        points = len(next(iter(params.values())))
        if per_point and len(x) != points:
            raise ValueError(f"x must be [N, B, ...] with N = {points}, got {list(x.shape)}")
        if self.graph_module is not None:
            return _Run(self.graph_module, params).run(
                x if per_point else x.expand(points, *x.shape)
            )
        every = torch.vmap(
            lambda p, x: functional_call(self.module, p, (x,), tie_weights=False),
            in_dims=(0, 0 if per_point else None),
            randomness="different",
        )
        return every(dict(params), x)


def _trace(module: nn.Module) -> tuple[fx.GraphModule | None, str]:
    """The graph with every node known, or None and the reason."""
    for name, layer in module.named_modules():
        if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
            return None, f"{name or 'the module'} has a hook or a replaced forward"
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # noqa: BLE001 - torch.fx raises whatever the user's forward raises
        return None, f"torch.fx cannot trace it: {error}"
    for node in graph.nodes:
        if reason := _why_not_stacked(node, module):
            return None, reason
    return fx.GraphModule(module, graph), ""


def _why_not_stacked(node: fx.Node, module: nn.Module) -> str:
    """What keeps a node from running on stacked parameters; empty if nothing does."""
    if node.op == "get_attr":
        return f"the parameter {node.target} is used outside a layer"
    if node.op == "call_module":
        layer = module.get_submodule(node.target)
        if type(layer) not in LAYERS or getattr(layer, "padding_mode", "zeros") != "zeros":
            return f"{node.target} ({layer}) has no stacked form"
        handler, args, in_place = LAYERS[type(layer)], (layer, {}), getattr(layer, "inplace", False)
    elif node.op in ("call_function", "call_method"):
        if node.target not in FUNCTIONS:
            return f"{node.format_node()} has no stacked form"
        handler, args = FUNCTIONS[node.target], ()
        in_place = node.kwargs.get("inplace", False) or node.target is operator.iadd
    else:
        return ""
    try:
        inspect.signature(handler).bind(*args, *node.args, **node.kwargs)
    except TypeError as error:
        return f"{node.format_node()}: {error}"
    if in_place and len(node.args[0].users) > 1:
        return f"{node.format_node()} changes a value in place that is used again"
    return ""


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout and its like off for a while: a path is one of networks, not of their noise."""
    training = [layer for layer in module.modules() if layer.training]
    module.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.training = True


def refuse_batch_norm(module: nn.Module) -> None:
    """ValueError, naming the layer, if the module has BatchNorm."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"layer {name or type(layer).__name__} is BatchNorm, whose running statistics do "
                "not interpolate between networks; use GroupNorm or LayerNorm in its place and "
                "train again"
            )


def stack(module: nn.Module) -> StackedModule:
    """The module as a function of N networks' stacked parameters: `(params, x) -> [N, B, ...]`.

    Equivalent to::

        torch.stack([functional_call(module, {k: v[i] for k, v in params.items()}, x)
                     for i in range(N)])

    Args:
        module: any nn.Module with one tensor in and one out, run in train or eval mode as it is;
            it is not changed, and its own parameter values are not used.

    Raises:
        TypeError: anything else.
        ValueError: a module with BatchNorm.

    Example:
        >>> nets = [resnet(8, 0.5) for _ in range(3)]
        >>> params, _ = torch.func.stack_module_state(nets)
        >>> stack(nets[0])(params, torch.randn(5, 3, 32, 32)).shape
        torch.Size([3, 5, 10])
    """
    return StackedModule(module)
