"""Stateless layers around the functions of the same name, with their default options.

`kernels.kernelize` maps a layer in by its forward's signature, hence the fewest arguments.
"""

from __future__ import annotations

from torch import Tensor, nn

from .path_js_div import js_div, path_js_div


class PathJSDiv(nn.Module):
    """`path_js_div` as a layer: [N, B, C] logits -> [E] nats."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, logits: Tensor) -> Tensor:
        return path_js_div(logits)


class JSDiv(nn.Module):
    """`js_div` as a layer: two [..., C] tensors of logits -> a scalar in nats."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        return js_div(p_logits, q_logits)
