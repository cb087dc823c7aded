"""Which convolution runs where: one line a shape, forward, input and weight gradient apart.

**Not measured yet**: every line, and what has none, is one cuDNN convolution a network. On a GPU
`python -m benchmarks.conv --save` times all ways of each, after checking that they agree, prints
the lines to put here and writes the times to benchmarks/results/conv-DEVICE.json.
"""

from __future__ import annotations

from typing import Dict, NamedTuple


class Shape(NamedTuple):
    """A square convolution with padding size // 2 over square images."""

    size: int
    stride: int
    channels: int
    out: int
    pixels: int  # height and width of its input


class Ways(NamedTuple):
    """ "grouped": one convolution with N groups; "dense": one a network; "triton": own kernel."""

    forward: str
    input: str
    weight: str


STREAMS = 1  # over which the convolutions of one call are spread, a network each; not measured, too
DENSE = Ways("dense", "dense", "dense")
TABLE: Dict[Shape, Ways] = {  # the paper's ResNet20 of width 4, bf16, N = 25, B = 256
    Shape(3, 1, 64, 64, 32): DENSE,
    Shape(3, 2, 64, 128, 32): DENSE,
    Shape(1, 2, 64, 128, 32): DENSE,
    Shape(3, 1, 128, 128, 16): DENSE,
    Shape(3, 2, 128, 256, 16): DENSE,
    Shape(1, 2, 128, 256, 16): DENSE,
    Shape(3, 1, 256, 256, 8): DENSE,
}
