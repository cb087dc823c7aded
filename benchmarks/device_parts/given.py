"""What every part is given: the device, the sizes and how to time on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from fastgeo_kernels.stacked.conv_table import TABLE, Shape

from benchmarks.path_jsd import GPU_SHAPES
from benchmarks.step_gpu import Setting
from fastgeo.profiling.measure import QUANTILES, quantiles, wall_seconds

FLUSH = 256 << 20  # bytes written between two calls, more than the cache of any GPU
CYCLES = 2e9  # of a second, no more: how long the device spins before what is timed


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        setting: of the step.
        convolutions: shape -> how often it is in a step.
        divergences: N, B, C.
        numbers: that the copy moves, fp32.
        short: N and B of the convolutions and norms that are checked in float64 as a whole.
        norms: C, height and width.
        dtype: of convolutions and norms.
        steps: of descent in two precisions.
        most: repetitions of a measurement.
        compiler: of torch.compile.
    """

    setting: Setting = Setting()
    convolutions: dict[Shape, int] = field(default_factory=lambda: counted(TABLE, Setting()))
    divergences: tuple[tuple[int, int, int], ...] = tuple(GPU_SHAPES)
    numbers: int = 1 << 28
    short: tuple[int, int] = (5, 8)
    norms: tuple[tuple[int, int], ...] = ((64, 32), (128, 16), (256, 8))
    dtype: torch.dtype = torch.bfloat16
    steps: int = 100
    most: int = 50
    compiler: str = "inductor"

    @property
    def inner(self) -> int:
        """Networks between the ends."""
        return self.setting.points - 2


def counted(shapes, setting: Setting) -> dict[Shape, int]:
    """How often each is in a step: the first of a stage has a stride, all behind it have none."""
    blocks = (setting.depth - 2) // 6
    first = min(shape.channels for shape in shapes)
    return {
        shape: 1 if shape.stride > 1 else 2 * blocks - (shape.channels > first) for shape in shapes
    }


# Under the interpreter a program takes 40 ms and more, so there are to be few. It has no sums in
# bf16, and building C++ takes a minute: of torch.compile only what comes before is run.
TINY = Sizes(
    setting=Setting(depth=8, width=0.25, pixels=8, points=4, batch=4),
    convolutions={Shape(3, 1, 4, 4, 4): 2, Shape(1, 2, 4, 8, 4): 1},
    divergences=((3, 4, 10), (2, 2, 20)),
    numbers=1 << 16,
    short=(2, 2),
    norms=((4, 4),),
    dtype=torch.float32,
    steps=3,
    most=1,
    compiler="aot_eager",
)


@dataclass(frozen=True)
class Given:
    """What a part is given.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        folder: where records are.
        seconds: that the part has.
        started: when it began, as of time.monotonic.
    """

    device: str
    sizes: Sizes
    folder: Path
    seconds: float
    started: float

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def times(
        self, function: Callable[[], object], seconds: float, *, cold: bool = False
    ) -> list[float]:
        """Seconds of single calls, as many as fit into the time; of one, if that is too long.

        On a GPU they are the device's own, by events, behind a pause in which the host runs ahead.

        Args:
            function: called before, too.
            seconds: for all calls together.
            cold: with the caches full of other data.
        """
        function()
        once = wall_seconds(function)
        if once > seconds:
            return [once]
        repeats = max(1, min(self.sizes.most, int(seconds / max(once, 1e-6))))
        if not self.gpu:
            return [wall_seconds(function) for _ in range(repeats)]
        other = torch.empty(FLUSH if cold else 0, dtype=torch.uint8, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in pairs:
            torch.cuda._sleep(int(CYCLES * min(2 * once + 1e-4, 0.05)))
            other.zero_()
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def in_ms(seconds: list[float]) -> dict[str, float]:
    """Quantiles, ms, and of how many measurements."""
    found = quantiles(seconds)
    return {level: 1e3 * found[level] for level in QUANTILES} | {"of": len(seconds)}


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error over the largest entry; NaN is an error without end."""
    error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    return error if error == error else float("inf")
