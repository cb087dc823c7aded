"""Stateless layers around the functions of the same name.

`kernels.kernelize` maps a layer in by its forward's signature; what a layer of another project was
made with, it finds on the module that it stands in for.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor, nn

from .path_js_div import fused_linear_js_div, js_div, path_js_div


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


class LigerJSD(nn.Module):
    """In place of Liger-Kernel's layer of this name, whose `beta` and `ignore_index` it reads. The
    student's log-probabilities come first; they are logits of themselves."""

    has_backward: bool = True
    can_torch_compile: bool = True
    beta: float
    ignore_index: int

    def forward(
        self, log_q: Tensor, log_p: Tensor, shift_labels: Optional[Tensor] = None
    ) -> Tensor:
        return js_div(
            log_p, log_q, beta=self.beta, labels=shift_labels, ignore_index=self.ignore_index
        )


class LigerFusedLinearJSD(nn.Module):
    """In place of Liger-Kernel's layer of this name, whose `jsd_beta`, `temperature` and
    `ignore_index` it reads."""

    has_backward: bool = True
    can_torch_compile: bool = True
    jsd_beta: float
    temperature: float
    ignore_index: int

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Optional[Tensor] = None,
    ) -> Tensor:
        return fused_linear_js_div(
            *(student_input, student_weight, teacher_input, teacher_weight),
            beta=self.jsd_beta,
            labels=shift_labels,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
        )
