"""Layers of N stacked networks: one operation in place of N.

`conv` and `norm` choose between PyTorch and the kernels beside them, `plain` is PyTorch alone, and
`layout` says how images of N networks lie in memory.
"""

from .conv import stacked_conv
from .norm import stacked_channel_norm, stacked_group_norm
from .plain import (
    stacked_conv_transpose,
    stacked_layer_norm,
    stacked_linear,
    stacked_rms_norm,
)

__all__ = [
    "stacked_channel_norm",
    "stacked_conv",
    "stacked_conv_transpose",
    "stacked_group_norm",
    "stacked_layer_norm",
    "stacked_linear",
    "stacked_rms_norm",
]
