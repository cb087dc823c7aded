"""The divergence along a path of logits: public functions, operators, launch, kernels, reference.

`public`, `fused` (behind a student's last layer) and `top_k` (a stored teacher) hold what callers
see, `options` what they may ask for. `operators` is what autograd and torch.compile see, `launch`
cuts a path into programs; `rows`, `tiles` and `pairs` are the kernels, `terms` is what they compute
for each class. `reference` is all of it in plain PyTorch, and `plain_pairs` what pairs take there.
"""

from .fused import fused_linear_js_div
from .public import js_div, path_fisher_rao, path_js_div, path_js_div_value_and_grad
from .top_k import top_k_js_div

__all__ = [
    "fused_linear_js_div",
    "js_div",
    "path_fisher_rao",
    "path_js_div",
    "path_js_div_value_and_grad",
    "top_k_js_div",
]
