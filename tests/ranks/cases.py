"""Optimisations that one process and the ranks of a mesh do alike, on a small smooth network."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from fastgeo import Descent, Forward, Path, optimize

STEPS = 20


class Net(nn.Module):
    """A network with a scalar, a tied, a frozen parameter and a buffer; no ReLU, whose kinks make
    rounding visible."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(6, 7)
        self.twice = nn.Linear(7, 7, bias=False)
        self.again = nn.Linear(7, 7)
        self.again.weight = self.twice.weight
        self.scale = nn.Parameter(torch.tensor(1.0 + seed / 9))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("shift", torch.randn(7))
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x)) + self.frozen
        x = torch.tanh(self.again(torch.tanh(self.twice(x) + self.shift)))
        return self.scale * self.head(x)


def inputs(count: int = 10, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64)


def with_labels(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Of which some rows do not count."""
    labels = (torch.arange(count) + seed) % 5
    labels[:: seed + 2] = -100
    return inputs(count, seed), labels


def linear(points: int, dtype: torch.dtype = torch.float64) -> Path:
    ends = (Net(seed).to(dtype) for seed in (1, 2))
    return Path.linear(*ends, points, interpolate_buffers=["shift"])


def curve(kind: str, points: int, inner: int) -> Path:
    how = {"bezier": "controls", "polychain": "bends"}[kind]
    ends = (Net(seed).double() for seed in (1, 2))
    build = getattr(Path, kind)
    return build(*ends, points, interpolate_buffers=["shift"], **{how: inner})


GEODESIC = Descent(lr=0.2, momentum=0.8, coarse_to_fine=False)
BATCHES = [inputs(10, seed) for seed in range(4)]
LABELLED = [with_labels(count, seed) for seed, count in enumerate((9, 10, 7))]
STACKED = Forward(engine="stacked")
CASES = {
    "geodesic": lambda: (linear(9), BATCHES, GEODESIC, STACKED),
    "coarse to fine": lambda: (
        linear(11),
        BATCHES,
        replace(GEODESIC, coarse_to_fine=True),
        STACKED,
    ),
    "chunks": lambda: (linear(9), BATCHES, GEODESIC, Forward(engine="stacked", chunk=1)),
    "chunks of two": lambda: (
        *(linear(11), LABELLED, replace(GEODESIC, coarse_to_fine=True)),
        Forward(engine="loop", chunk=2),
    ),
    "not preconditioned": lambda: (
        *(linear(8), LABELLED, replace(GEODESIC, lr=2.0, momentum=0.0, precondition=False)),
        STACKED,
    ),
    "labels": lambda: (
        *(linear(8), LABELLED, replace(GEODESIC, objective="cross_entropy")),
        STACKED,
    ),
    "one point": lambda: (linear(3), BATCHES, GEODESIC, STACKED),
    "one row": lambda: (linear(6), [inputs(1)], GEODESIC, STACKED),
    "random nodes": lambda: (linear(6), BATCHES, replace(GEODESIC, nodes=3), STACKED),
    "bezier": lambda: (
        *(curve("bezier", 7, 3), BATCHES, replace(GEODESIC, nodes=5, coarse_to_fine=True)),
        STACKED,
    ),
    "bezier, own points": lambda: (curve("bezier", 7, 1), LABELLED, GEODESIC, STACKED),
    "polychain, labels": lambda: (
        *(curve("polychain", 7, 2), LABELLED),
        *(replace(GEODESIC, nodes=3, objective="cross_entropy"), STACKED),
    ),
}


def run(name: str, **options) -> Path:
    """One of the cases, in float64."""
    torch.manual_seed(0)
    path, batches, descent, forward = CASES[name]()
    module = Net().to(next(iter(path.interior.values())).dtype)
    how = dict(steps=STEPS, descent=descent, forward=forward) | options
    return optimize(path, module, batches, **how)
