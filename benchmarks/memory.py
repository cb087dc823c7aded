"""Peak memory of one optimisation step against N: `python -m benchmarks.memory`.

Each measurement is a process of its own. What counts is memory beyond what the process held before
its first step: activations, gradients, and whatever the allocator keeps.
"""

import resource
import subprocess
import sys
from dataclasses import dataclass

import torch
import tyro

from benchmarks.harness import device_slug, environment, write_result
from fastgeo import Path, keep_pages, models, optimize
from fastgeo.measure import headline, table

POINTS = (5, 9, 17, 33)
ENGINES = {
    "stacked": dict(engine="stacked"),
    "stacked, chunk = 4": dict(engine="stacked", chunk=4),
    "stacked, chunk = 1": dict(engine="stacked", chunk=1),
    "stacked, memory_budget = 1GiB": dict(engine="stacked", memory_budget="1GiB"),
    "loop": dict(engine="loop"),
    "loop, chunk = 4": dict(engine="loop", chunk=4),
}


@dataclass(frozen=True)
class Options:
    """Peak memory of a step: ResNet8 of width 1, 32x32 images."""

    batch: int = 128
    """images"""
    save: bool = False
    """write benchmarks/results/memory-DEVICE.json"""


def peak_of_a_step(name: str, points: int, batch: int) -> float:
    """MiB, measured in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keep_pages()
    torch.manual_seed(0)
    module, a, b = (models.resnet(8, 1).to(device) for _ in range(3))
    path, x = Path.linear(a, b, points), torch.randn(batch, 3, 32, 32, device=device)
    with torch.no_grad():
        module(x[:1])
    before = _peak()
    optimize(path, module, [x], steps=2, channels_last=False, **ENGINES[name])
    return (_peak() - before) / 2**20


def _peak() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else 1024 * kib


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "--one":
        print(peak_of_a_step(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return
    options = tyro.cli(Options, prog="python -m benchmarks.memory")
    print(headline(environment()))
    rows = []
    for name in ENGINES:
        row = {"MiB beyond the start, ResNet8 width 1": f"{name}, B = {options.batch}"}
        for points in POINTS:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", name]
            command += [str(points), str(options.batch)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row[f"N = {points}"] = round(float(done.stdout))
        rows.append(row)
    print(table(rows))
    if options.save:
        print(f"\nwrote {write_result(f'memory-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
