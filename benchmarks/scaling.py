"""How a step's time and memory grow: `python -m benchmarks.scaling`, a plot and a table.

Against the number of points, the batch, the width and the chunk, one of them at a time. Time
should be linear in N, and memory flat where the step streams (a chunk is set).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.harness import RESULTS, device_slug, environment, write_result
from fastgeo import Descent, Forward, Path, keep_pages, models, optimize
from fastgeo.figures import PALETTE, write_figure
from fastgeo.profiling.measure import headline, now, peak_bytes, quantiles, table


@dataclass(frozen=True)
class Setting:
    """A ResNet8 on images of three channels."""

    points: int = 25
    batch: int = 64
    width: float = 0.5
    pixels: int = 8
    chunk: int | None = None


@dataclass(frozen=True)
class Options:
    """Times and memory of a step of the stacked engine against its sizes."""

    repeats: int = 7
    """measurements of each setting"""
    full: bool = False
    """a GPU's sizes: 32x32 images, batches of 256, width 4"""
    save: bool = False
    """write benchmarks/results/scaling-DEVICE.json and scaling-DEVICE.png"""


SWEEPS: dict[str, tuple] = {
    "points": (3, 5, 9, 17, 25, 50, 100),
    "points, 4 at a time": (3, 5, 9, 17, 25, 50, 100),
    "batch": (8, 16, 32, 64, 128, 256),
    "width": (0.25, 0.5, 1, 2),
    "chunk": (1, 2, 4, 8, 23),
}


def settings(base: Setting) -> Iterator[tuple[str, float, Setting]]:
    """(sweep, value, setting) of each measurement."""
    for sweep, values in SWEEPS.items():
        name, *streamed = sweep.split(",")
        for value in values:
            changed = {name: value * base.width / 0.5 if name == "width" else value}
            yield sweep, value, replace(base, **({"chunk": 4} if streamed else {}), **changed)


def measure(setting: Setting, repeats: int, device: str) -> dict[str, Any]:
    """Time and memory of a step."""
    torch.manual_seed(0)
    module, a, b = (models.resnet(8, setting.width).to(device) for _ in range(3))
    path = Path.linear(a, b, setting.points)
    x = torch.randn(setting.batch, 3, setting.pixels, setting.pixels, device=device)
    options = dict(
        descent=Descent(momentum=0.0, coarse_to_fine=False),
        forward=Forward(engine="stacked", chunk=setting.chunk),
        cuda_graph=False,
    )
    times: list[float] = []

    def stamped() -> Iterator[Tensor]:
        while True:
            times.append(now())
            yield x

    optimize(path, module, stamped(), steps=repeats + 2, **options)
    steps = [after - before for before, after in zip(times[1:-1], times[2:], strict=True)]
    peak = peak_bytes(lambda: optimize(path, module, [x], steps=1, **options))
    return {
        "ms": {level: 1e3 * s for level, s in quantiles(steps).items()},
        "peak MiB": round(peak / 2**20),
    }


def linear_in_points(rows: list[dict[str, Any]]) -> str:
    """How the time a point differs between the few and the many, in words."""
    own = [row for row in rows if row["sweep"] == "points" and row["value"] >= 9]
    each = [row["ms"]["p50"] / (row["value"] - 2) for row in own]
    return (
        f"ms a step and interior point: {each[0]:.3g} at N = {own[0]['value']}, "
        f"{each[-1]:.3g} at N = {own[-1]['value']}"
    )


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Time above, memory below, a column for each sweep."""
    names = ("points", "batch", "width", "chunk")
    drawn = Figure(figsize=(12, 5.5), layout="constrained")
    axes = drawn.subplots(2, len(names), sharex="col")
    for column, name in enumerate(names):
        sweeps = [sweep for sweep in SWEEPS if sweep.split(",")[0] == name]
        for sweep, style in zip(sweeps, PALETTE, strict=False):
            look = dict(color=style.colour, marker=style.marker, ls=style.dashes, markersize=3)
            own = [row for row in rows if row["sweep"] == sweep]
            x = [row["value"] for row in own]
            streams = "4 at a time" if "," in sweep else "all at once" if name == "points" else None
            low, middle, high = ([row["ms"][q] for row in own] for q in ("p20", "p50", "p80"))
            axes[0][column].plot(x, middle, label=streams, **look)
            axes[0][column].fill_between(x, low, high, alpha=0.2, color=style.colour)
            axes[1][column].plot(x, [row["peak MiB"] for row in own], **look)
            if streams:
                axes[0][column].legend(frameon=False)
        axes[1][column].set_xlabel({"points": "N, points", "batch": "B, images"}.get(name, name))
    axes[0][0].set_ylabel("a step, ms")
    axes[1][0].set_ylabel("peak beyond the weights, MiB")
    for axis in axes.flat:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.scaling")
    keep_pages()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = Setting(batch=256, width=4, pixels=32) if options.full else Setting()
    print(headline(environment()), flush=True)
    rows = []
    for sweep, value, setting in settings(base):
        found = measure(setting, options.repeats, device)
        size = f"ResNet8 width {setting.width:g}, {setting.pixels}x{setting.pixels}"
        rows.append({"network": size, "sweep": sweep, "value": value, **found})
    print(table(rows), linear_in_points(rows), sep="\n\n")
    if options.save:
        name = f"scaling-{device_slug()}"
        write_figure(RESULTS / f"{name}.png", figure(rows))
        print(f"\nwrote {write_result(name, {'rows': rows})}")


if __name__ == "__main__":
    main()
