"""Any nn.Module as a function of stacked parameters: N networks in one pass.

The module is traced once with torch.fx and its graph is run on stacked parameters: a convolution
becomes one with N groups, a linear layer a batched matrix product, GroupNorm one with N times the
groups, and elementwise operations stay as they are. A module with a node that is not in `LAYERS` or
`FUNCTIONS` below, or one that cannot be traced, goes through torch.func.vmap as a whole.

Inside, every value is [N, B, ...]; what all networks share has stride 0 along N.
"""

import operator
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from fastgeo_kernels import (
    stacked_conv2d,
    stacked_group_norm,
    stacked_layer_norm,
    stacked_linear,
)
from torch import Tensor, fx, nn

from fastgeo.models import ChannelNorm

Parameters = Mapping[str, Tensor]


def _conv2d(layer: nn.Conv2d, p: Parameters, x: Tensor) -> Tensor:
    return stacked_conv2d(
        x, p["weight"], p.get("bias"), layer.stride, layer.padding, layer.dilation, layer.groups
    )


def _linear(layer: nn.Linear, p: Parameters, x: Tensor) -> Tensor:
    return stacked_linear(x, p["weight"], p.get("bias"))


def _group_norm(layer: nn.GroupNorm, p: Parameters, x: Tensor) -> Tensor:
    return stacked_group_norm(x, layer.num_groups, p.get("weight"), p.get("bias"), layer.eps)


def _channel_norm(layer: ChannelNorm, p: Parameters, x: Tensor) -> Tensor:
    pixels = x.permute(0, 1, 3, 4, 2)  # [N, B, H, W, C]
    out = stacked_layer_norm(pixels, p.get("weight"), p.get("bias"), layer.eps)
    return out.permute(0, 1, 4, 2, 3)


def _flatten(x: Tensor, start_dim: int = 0, end_dim: int = -1) -> Tensor:
    return x.flatten(_behind_n(start_dim), _behind_n(end_dim))


def _mean(x: Tensor, dim: int | tuple[int, ...], keepdim: bool = False) -> Tensor:
    dims = (dim,) if isinstance(dim, int) else dim
    return x.mean([_behind_n(d) for d in dims], keepdim)


def _behind_n(dim: int) -> int:
    """A dimension of [B, ...] as one of [N, B, ...]."""
    return dim + 1 if dim >= 0 else dim


LAYERS: dict[type[nn.Module], Callable] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    ChannelNorm: _channel_norm,
    nn.ReLU: lambda layer, p, x: F.relu(x),
    nn.Flatten: lambda layer, p, x: _flatten(x, layer.start_dim, layer.end_dim),
    nn.Identity: lambda layer, p, x: x,
}
FUNCTIONS: dict[Callable | str, Callable] = {
    F.relu: lambda x, inplace=False: F.relu(x),
    torch.relu: F.relu,
    "relu": F.relu,
    operator.add: operator.add,
    torch.add: torch.add,
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
            lambda p, x: torch.func.functional_call(self.module, p, (x,)),
            in_dims=(0, 0 if per_point else None),
            randomness="different",
        )
        return every(dict(params), x)


def _trace(module: nn.Module) -> tuple[fx.GraphModule | None, str]:
    """The graph with every node known, or None and the reason."""
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # noqa: BLE001 - torch.fx raises whatever the user's forward raises
        return None, f"torch.fx cannot trace it: {error}"
    for node in graph.nodes:
        if node.op == "call_module":
            layer = module.get_submodule(node.target)
            if type(layer) not in LAYERS or getattr(layer, "padding_mode", "zeros") != "zeros":
                return None, f"{node.target} ({layer}) has no stacked form"
        elif node.op in ("call_function", "call_method") and node.target not in FUNCTIONS:
            return None, f"{node.format_node()} has no stacked form"
        elif node.op == "get_attr":
            return None, f"the parameter {node.target} is used outside a layer"
    return fx.GraphModule(module, graph), ""


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
        module: any nn.Module with one tensor in and one out; it is not changed, and its own
            parameter values are not used.

    Raises:
        ValueError: a module with BatchNorm.

    Example:
        >>> nets = [resnet(8, 0.5) for _ in range(3)]
        >>> params, _ = torch.func.stack_module_state(nets)
        >>> stack(nets[0])(params, torch.randn(5, 3, 32, 32)).shape
        torch.Size([3, 5, 10])
    """
    return StackedModule(module)
