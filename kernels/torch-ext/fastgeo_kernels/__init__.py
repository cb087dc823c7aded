"""Operations on the logits and layers of N stacked networks.

N path points, E = N - 1 edges between neighbours, B batch, C classes.
Needs torch alone, and triton on GPUs; the folder can be copied into another project as it is.
"""

from . import layers
from .pages import keep_pages
from .path_js_div import (
    fused_linear_js_div,
    js_div,
    path_fisher_rao,
    path_js_div,
    path_js_div_value_and_grad,
    top_k_js_div,
)
from .path_update import inverse_path_laplacian, path_update
from .stacked import (
    stacked_channel_norm,
    stacked_conv,
    stacked_conv_transpose,
    stacked_group_norm,
    stacked_layer_norm,
    stacked_linear,
    stacked_rms_norm,
)

__all__ = [
    "fused_linear_js_div",
    "inverse_path_laplacian",
    "js_div",
    "keep_pages",
    "layers",
    "path_fisher_rao",
    "path_js_div",
    "path_js_div_value_and_grad",
    "path_update",
    "stacked_channel_norm",
    "stacked_conv",
    "stacked_conv_transpose",
    "stacked_group_norm",
    "stacked_layer_norm",
    "stacked_linear",
    "stacked_rms_norm",
    "top_k_js_div",
]
