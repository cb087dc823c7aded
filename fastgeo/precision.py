"""Numbers that a network is evaluated in: fp32, TF32 products, or a bf16 body with an fp32 head.

In bf16 the layers that take parameters, and so what follows them, run on bf16 copies of parameters
and inputs; parameters stay as they are, and so do their gradients' dtypes. The last layers before
the output, and all behind them, are in fp32: rounding the logits to bf16 would cost the gradient of
the divergence its digits where neighbours are close.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fastgeo.values import Stacked

PRECISIONS = ("fp32", "tf32", "bf16")


def check_precision(precision: str) -> None:
    """ValueError unless it is one."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be {', '.join(PRECISIONS)}, got {precision!r}")


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """fp32 products on a GPU as they are, or rounded to TF32, for a while; a CPU has no TF32."""
    backends = torch.backends
    older = backends.cuda.matmul, backends.cudnn
    newer = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn
    allowed = [_allows_tf32(backend) for backend in older]
    before = [backend.fp32_precision for backend in newer]
    for backend in older:
        backend.allow_tf32 = precision == "tf32"
    for backend in newer:  # behind the older setting, which changes these; "none" is another's
        backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for backend, allow in zip(older, allowed, strict=True):
            if allow is not None:
                backend.allow_tf32 = allow
        for backend, value in zip(newer, before, strict=True):
            backend.fp32_precision = value


def _allows_tf32(backend: Any) -> bool | None:
    """PyTorch's older setting; None where the newer one says otherwise, in which case it raises."""
    try:
        return backend.allow_tf32
    except RuntimeError:
        return None


class Casts:
    """Which nodes of a traced graph are layers of the body, and which of the head.

    Attributes:
        body, head: nodes that take parameters; those of the head have none behind them.
    """

    def __init__(self, graph: fx.Graph, constants: dict[str, Tensor]):
        parameters = set()  # and what is computed of nothing else
        takes = []
        for node in graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr":
                if node.target not in constants:
                    parameters.add(node)
            elif node.op == "call_module":
                takes.append(node)
            elif inputs and parameters.issuperset(inputs):
                parameters.add(node)
            elif parameters.intersection(inputs):
                takes.append(node)
        (output,) = (node for node in graph.nodes if node.op == "output")
        self.head, seen, ahead = set(), set(), [output]
        layers = set(takes)
        while ahead:
            node = ahead.pop()
            if node in seen or node in parameters:
                continue
            seen.add(node)
            if node in layers:
                self.head.add(node)
            else:
                ahead += node.all_input_nodes
        self.body = layers - self.head

    def __call__(self, node: fx.Node, value: Any) -> Any:
        """The arguments of a node in the dtype that it runs in."""
        if node in self.body:
            return _cast(value, torch.bfloat16)
        if node in self.head:
            leaves = (_tensor(leaf) for leaf in pytree.tree_leaves(value))
            double = any(t is not None and t.dtype == torch.float64 for t in leaves)
            return _cast(value, torch.float64 if double else torch.float32)
        return value

    def parameters_of_body(self) -> set[str]:
        """Names that are used by layers of the body and by no other node."""
        return _names(self.body) - _names(self.head)


def _names(layers: set[fx.Node]) -> set[str]:
    return {i.target for node in layers for i in node.all_input_nodes if i.op == "get_attr"}


def _tensor(leaf: Any) -> Tensor | None:
    leaf = leaf.tensor if isinstance(leaf, Stacked) else leaf
    return leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def one(leaf: Any) -> Any:
        tensor = _tensor(leaf)
        if tensor is None or tensor.dtype == dtype:
            return leaf
        return Stacked(tensor.to(dtype)) if isinstance(leaf, Stacked) else tensor.to(dtype)

    return pytree.tree_map(one, value)
