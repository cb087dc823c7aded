"""The optimisation step against what users would set up: `python -m benchmarks.step`.

The paper's loop over modules as it is, with modules and images in channels-last, with compiled
modules, and under torch.func.vmap (`fastgeo.profiling.baselines`). The energy and gradient of each
are checked against the loop in float64 before its time counts (`fastgeo.profiling.compare`). On a
GPU the default is the paper's step in every precision, replayed from CUDA graphs, against what
users would set up there (`benchmarks.step_gpu`), and each of its kernels against its floor
(`benchmarks.roofline`).
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from benchmarks import roofline, step_gpu
from benchmarks.harness import device_slug, environment, printed, write_result
from fastgeo import Path, keep_pages, models
from fastgeo.profiling.compare import compare
from fastgeo.profiling.measure import headline, matmul_rate, table

SETTINGS = {  # depth, width, channels, pixels, N, B
    "digits preset": (8, 0.5, 1, 8, 25, 128),
    "paper-small preset": (8, 1, 3, 32, 9, 64),
    "ResNet8 width 0.5": (8, 0.5, 3, 32, 9, 128),
    "ResNet8 width 1": (8, 1, 3, 32, 7, 128),
    "ResNet20 width 1": (20, 1, 3, 32, 25, 16),
    "ResNet20 width 4": (20, 4, 3, 32, 5, 16),
    "cifar10 preset": (20, 1, 3, 32, 25, 256),
    "paper preset": (20, 4, 3, 32, 25, 256),
}
GRID = {  # name -> depth, width, channels, pixels, N, B
    f"ResNet8 width {width:g}, {pixels}x{pixels}, N = {n}, B = {b}": (8, width, 3, pixels, n, b)
    for pixels, widths in ((8, (0.5, 1, 4)), (32, (0.5, 1, 2)))
    for width in widths
    for n in (5, 25)
    for b in (16, 128)
    if pixels == 8 or n * b * width <= 25 * 64
}
ALL = list(SETTINGS)[:6]  # those that a CPU does in minutes


@dataclass(frozen=True)
class Options:
    """Times the step of fastgeo, of the loop over modules, and of its usual improvements."""

    setting: str = "auto"
    """auto (paper step on a GPU, digits preset elsewhere); paper step; digits preset, paper-small
    preset, ResNet8 width 0.5, ResNet8 width 1, ResNet20 width 1, ResNet20 width 4, all of these;
    cifar10 preset and paper preset (a GPU's); or grid: (width, N, B), fastgeo against the loop
    only. The first words of a name are enough: digits, or ResNet8 for both of them"""
    steps: int = 3
    """steps in one measurement, after one that is not measured"""
    repeats: int = 10
    """measurements of each"""
    compiled: bool = True
    """also the loop over compiled modules"""
    keep_pages: bool = True
    """let malloc reuse large blocks, as the command line does (see fastgeo.keep_pages)"""
    save: bool = False
    """write benchmarks/results/step-DEVICE.json, or step-grid-DEVICE.json"""


def measure(
    name: str, *, device: str, steps: int = 3, repeats: int = 10, compiled: bool = True
) -> list[dict[str, Any]]:
    """A row for each implementation (`fastgeo.profiling.compare`)."""
    depth, width, channels, pixels, points, batch = (SETTINGS | GRID)[name]
    torch._dynamo.reset()  # or, past its limit of recompilations, the compiled loop is not compiled
    torch.manual_seed(0)
    module, a, b = (models.resnet(depth, width, in_channels=channels).to(device) for _ in range(3))
    x = torch.randn(batch, channels, pixels, pixels, device=device)
    rows = compare(
        module,
        Path.linear(a, b, points),
        x,
        steps=steps,
        repeats=repeats,
        compiled=compiled and name in SETTINGS,
        improved=name in SETTINGS,
    )
    title = f"{name}, N = {points}, B = {batch}" if name in SETTINGS else name
    return [{"setting": title, **row} for row in rows]


def chosen(setting: str) -> list[str]:
    """The settings that are meant by a name or by the first words of one.

    Raises:
        ValueError: it is none.
    """
    groups = {"all": ALL, "grid": list(GRID)} | {name: [name] for name in SETTINGS | GRID}
    names = groups.get(setting, [n for n in SETTINGS if n.startswith(f"{setting} ")])
    if not names:
        raise ValueError(
            f"setting must be all, grid, paper step or one of {', '.join(SETTINGS)}, got {setting}"
        )
    return names


def _paper_step(options: Options, device: str) -> None:
    print(headline(environment()), end="\n\n", flush=True)
    setting, how = step_gpu.Setting(), dict(repeats=options.repeats)
    rate = matmul_rate(device, torch.bfloat16)
    names = step_gpu.chosen(gpu=device == "cuda", compiled=options.compiled)
    measured = []
    for one in step_gpu.measure(step_gpu.Start.of(setting, device), names, **how):
        words = " ".join(f"{1e3 * t:.2f}" for t in one.seconds)
        print(f"{one.name}: {one.failed or words + ' ms'}", file=sys.stderr, flush=True)
        measured.append(one)
    flop = setting.flop(models.resnet(setting.depth, setting.width))
    rows = step_gpu.rows(measured, flop, rate)
    print(table(rows), end="\n\n", flush=True)
    floors = roofline.measure(setting, device, rate, **how)
    print(table(floors))
    if options.save:
        payload = {"rows": rows, "roofline": floors}
        print(f"\nwrote {write_result(f'step-paper-{device_slug()}', payload)}")


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.keep_pages:
        keep_pages()
    setting = options.setting
    if setting == "auto":
        setting = "paper step" if device == "cuda" else "digits preset"
    if setting == "paper step":
        return _paper_step(options, device)
    try:
        names = chosen(setting)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    print(headline(environment()), flush=True)
    how = dict(device=device, steps=options.steps, repeats=options.repeats)
    rows = printed(measure(name, compiled=options.compiled, **how) for name in names)
    if options.save:
        name = "step-grid" if setting == "grid" else "step"
        print(f"\nwrote {write_result(f'{name}-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
