"""Stateless layers around the functions of the same name."""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from .path_js_div import js_div, path_js_div


class PathJSDiv(nn.Module):
    """`path_js_div` as a layer: [N, B, C] logits -> [E] nats."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        logits: Tensor,
        edge_weight: Optional[Tensor] = None,
        sample_weight: Optional[Tensor] = None,
        temperature: float = 1.0,
        reduction: str = "batchmean",
    ) -> Tensor:
        return path_js_div(
            logits,
            reduction=reduction,
            edge_weight=edge_weight,
            sample_weight=sample_weight,
            temperature=temperature,
        )


class JSDiv(nn.Module):
    """`js_div` as a layer: two [..., C] tensors of logits -> a scalar in nats."""

    has_backward: bool = True
    can_torch_compile: bool = True

    def forward(
        self,
        p_logits: Tensor,
        q_logits: Tensor,
        sample_weight: Optional[Tensor] = None,
        temperature: float = 1.0,
        reduction: str = "batchmean",
    ) -> Tensor:
        return js_div(
            p_logits,
            q_logits,
            reduction=reduction,
            sample_weight=sample_weight,
            temperature=temperature,
        )
