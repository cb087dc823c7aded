"""The divergence along a path of logits: public functions, operators, launch, kernels, reference.

`public` holds what callers see, `operators` what autograd and torch.compile see, `launch` cuts a
path into programs, `rows` and `tiles` are the two kernels, `terms` is what they compute for each
class, and `reference` is all of it in plain PyTorch.
"""

from .fused import fused_linear_js_div
from .public import js_div, path_fisher_rao, path_js_div, path_js_div_value_and_grad

__all__ = [
    "fused_linear_js_div",
    "js_div",
    "path_fisher_rao",
    "path_js_div",
    "path_js_div_value_and_grad",
]
