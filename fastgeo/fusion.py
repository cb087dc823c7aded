"""Runs of normalisation, residual sum and ReLU in a graph as one operation, which has a kernel.

Only where nothing else looks at what lies between. Without a GPU the operation does what the graph
did, in the same order.
"""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx

GROUP_NORM = (F.group_norm, torch.group_norm)
LAYER_NORM = (F.layer_norm, torch.layer_norm)
RELU = (F.relu, torch.relu, "relu")
ADD = (operator.add, torch.add, "add")


def group_norm_run(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """GroupNorm with one group, + residual, ReLU; of one network."""
    return _behind(F.group_norm(input, 1, weight, bias, eps), residual, relu)


def channel_norm_run(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """LayerNorm over the channels at each pixel of [B, C, H, W], + residual, ReLU."""
    x = input.permute(0, 2, 3, 1)
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps).permute(0, 3, 1, 2)
    return _behind(y, residual, relu)


def _behind(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = y if residual is None else y + residual
    return F.relu(y) if relu else y


def fuse(graph: fx.Graph) -> None:
    """Replace the runs in a graph, each by one node where its last one was."""
    for node in list(graph.nodes):
        if found := _group_norm(node) or _channel_norm(node):
            _fuse_run(graph, *found)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _fuse_run(graph: fx.Graph, function: Callable, norm: list[fx.Node], given: tuple) -> None:
    """norm: its nodes, the last of which has its value; given: input, weight, bias, eps."""
    run, residual = list(norm), None
    following = _only_user(run[-1], ADD)
    if following is not None and len(following.args) == 2 and not following.kwargs:
        others = [arg for arg in following.args if arg is not run[-1]]
        if len(others) == 1 and isinstance(others[0], fx.Node):
            residual = others[0]
            run.append(following)
    rectified = _only_user(run[-1], RELU)
    if rectified is not None:
        run.append(rectified)
    if len(run) == 1:
        return  # a norm by itself
    with graph.inserting_before(run[-1]):
        args = (*given, residual, rectified is not None)
        fused = graph.call_function(function, args)
    fused.meta = dict(next(n for n in norm if n.meta.get("nn_module_stack")).meta)
    if residual is not None and "in_place" in following.meta:
        fused.meta["in_place"] = len(given) if following.args[0] is residual else 0
    run[-1].replace_all_uses_with(fused)
    for node in reversed(run):
        graph.erase_node(node)


def _group_norm(node: fx.Node) -> tuple | None:
    if node.op != "call_function" or node.target not in GROUP_NORM:
        return None
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), node.args, strict=False))
    given |= node.kwargs
    if given["num_groups"] != 1 or not set(given) <= {"input", "num_groups", *_AFFINE}:
        return None
    return group_norm_run, [node], (given["input"], *_affine(given))


def _channel_norm(node: fx.Node) -> tuple | None:
    """A permutation to channels-last, LayerNorm over the channels, and back."""
    if node.op != "call_function" or node.target not in LAYER_NORM:
        return None
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    before, behind = given["input"], _only_user(node, ("permute", torch.permute))
    known = set(given) <= {"input", "normalized_shape", *_AFFINE}
    if not known or len(given["normalized_shape"]) != 1 or behind is None:
        return None
    if not isinstance(before, fx.Node) or before.target not in ("permute", torch.permute):
        return None
    if len(before.users) != 1 or _order(before) != (0, 2, 3, 1) or _order(behind) != (0, 3, 1, 2):
        return None
    return channel_norm_run, [before, node, behind], (before.args[0], *_affine(given))


_AFFINE = {"weight": None, "bias": None, "eps": 1e-5}


def _affine(given: dict) -> tuple:
    return tuple((_AFFINE | given)[name] for name in _AFFINE)


def _order(permute: fx.Node) -> tuple:
    dims = permute.args[1:]
    return tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else tuple(dims)


def _only_user(node: fx.Node, targets: tuple) -> fx.Node | None:
    """The one user of a node, if it is a call of one of the targets."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.op in ("call_function", "call_method") and user.target in targets else None
