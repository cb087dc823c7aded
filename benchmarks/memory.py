"""Peak memory of one optimisation step against N, or against the tokens of a batch:
`python -m benchmarks.memory`.

Each measurement is a process of its own. What counts is memory beyond what the process held before
its first step: activations, gradients, and whatever the allocator keeps.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from statistics import median

import torch
import tyro

from benchmarks.harness import device_slug, environment, write_result
from fastgeo import Descent, Forward, Path, keep_pages, models, optimize, stack
from fastgeo.profiling.measure import headline, table
from fastgeo.step.memory import step_memory

POINTS = (5, 9, 17, 33)
PLAIN = Descent(momentum=0.0, coarse_to_fine=False)
ENGINES = {
    "stacked": Forward(engine="stacked", channels_last=False),
    "stacked, chunk = 4": Forward(engine="stacked", chunk=4, channels_last=False),
    "stacked, chunk = 1": Forward(engine="stacked", chunk=1, channels_last=False),
    "stacked, memory_budget = 1GiB": Forward(
        engine="stacked", memory_budget="1GiB", channels_last=False
    ),
    "loop": Forward(engine="loop", channels_last=False),
    "loop, chunk = 4": Forward(engine="loop", chunk=4, channels_last=False),
}


@dataclass(frozen=True)
class Options:
    """Peak memory of a step: ResNet8 of width 1, 32x32 images."""

    batch: int = 128
    """images"""
    estimate: bool = False
    """instead, the estimate that a run makes before it starts against the measured peak, over
    three networks and sizes"""
    vocabulary: bool = False
    """instead, a decoder of 16 channels with the vocabulary of GPT-2, N = 9, against the length T
    of the one text in a batch"""
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
    optimize(path, module, [x], steps=2, descent=PLAIN, forward=ENGINES[name], cuda_graph=False)
    return (_peak() - before) / 2**20


def peak_of_a_text(tokens: int) -> float:
    """MiB, measured in this process."""
    keep_pages()
    torch.manual_seed(0)
    make = partial(models.gpt, VOCABULARY, block_size=max(TOKENS), depth=1, width=0.125)
    module, a, b = (make() for _ in range(3))
    path, text = Path.linear(a, b, OF_TEXTS), torch.randint(VOCABULARY, (1, tokens))
    forward = Forward(engine="stacked")
    with torch.no_grad():
        module(text[:, :1])
    before = _peak()
    optimize(path, module, [text], steps=1, descent=PLAIN, forward=forward, cuda_graph=False)
    return (_peak() - before) / 2**20


def peak_and_estimate(setting: str) -> tuple[float, float]:
    """MiB, the first measured in this process; `setting` is a key of `SETTINGS`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_pages()
    torch.manual_seed(0)
    make, size, points, batch, forward = SETTINGS[setting]
    module, a, b = (make().to(device) for _ in range(3))
    path, x = Path.linear(a, b, points), torch.randn(batch, *size, device=device)
    with torch.no_grad():
        module(x[:1])
    network = stack(module.eval(), engine=forward.engine)
    params = {name: tensor[None] for name, tensor in module.state_dict().items()}
    need = step_memory(network, params, x[:8], networks=points - 2, scale=batch / 8)
    before = _peak()
    optimize(path, module, [x], steps=3, descent=PLAIN, forward=forward, cuda_graph=False)
    peak = need.peak(points - 2, forward.chunk)
    return (_peak() - before) / 2**20, peak / 2**20


TEXT, VOCABULARY = "text", 50_257
TOKENS, OF_TEXTS = (256, 512, 1024), 9


def resnet(depth: int, width: float, channels: int) -> Callable[[], torch.nn.Module]:
    return lambda: models.resnet(depth, width, in_channels=channels)


DIGITS, CIFAR = (1, 8, 8), (3, 32, 32)
SETTINGS = {
    "digits preset, stacked": (
        resnet(8, 0.5, 1),
        DIGITS,
        25,
        128,
        Forward(engine="stacked", channels_last=False),
    ),
    "digits preset at B = 1,024, stacked": (
        *(resnet(8, 0.5, 1), DIGITS, 25, 1024),
        Forward(engine="stacked", channels_last=False),
    ),
    "cifar10 preset at N = 9, B = 32, stacked": (
        *(resnet(20, 1, 3), CIFAR, 9, 32),
        Forward(engine="stacked", channels_last=False),
    ),
    "cifar10 preset at B = 64, chunk = 4, stacked": (
        *(resnet(20, 1, 3), CIFAR, 25, 64),
        Forward(engine="stacked", chunk=4, channels_last=False),
    ),
    "cifar10 preset at N = 9, B = 32, loop": (
        *(resnet(20, 1, 3), CIFAR, 9, 32),
        Forward(engine="loop", channels_last=False),
    ),
    "paper preset at B = 16, chunk = 4, stacked": (
        *(resnet(20, 4, 3), CIFAR, 25, 16),
        Forward(engine="stacked", chunk=4, channels_last=False),
    ),
    "ResNet8 width 1, N = 17, B = 128, stacked": (
        *(resnet(8, 1, 3), CIFAR, 17, 128),
        Forward(engine="stacked", channels_last=False),
    ),
}


def compare(setting: str, processes: int = 3) -> dict[str, object]:
    """A row: the median peak of so many processes, because one varies by a fifth."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", setting]
    peaks = []
    for _ in range(processes):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured, estimated = map(float, done.stdout.split())
        peaks.append(measured)
    return {
        "setting": setting,
        "measured, MiB": round(median(peaks)),
        "least to most": f"{min(peaks):.0f} to {max(peaks):.0f}",
        "estimated, MiB": round(estimated),
        "estimated / measured": round(estimated / median(peaks), 2),
    }


def _peak() -> int:
    """Bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss, which begins with what the parent process holds.
    status = FilePath("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def measured(*what: object) -> float:
    """MiB, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", *map(str, what)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        _, _, name, *sizes = sys.argv
        if name == TEXT:
            print(peak_of_a_text(*map(int, sizes)))
        elif sizes:
            print(peak_of_a_step(name, *map(int, sizes)))
        else:
            print(*peak_and_estimate(name))
        return
    options = tyro.cli(Options, prog="python -m benchmarks.memory")
    print(headline(environment()))
    kind = "memory"
    if options.estimate:
        kind = "memory-estimate"
        rows = [compare(setting) for setting in SETTINGS]
    elif options.vocabulary:
        kind = "memory-vocabulary"
        each = OF_TEXTS * VOCABULARY * 4 / 2**20
        first = f"MiB, N = {OF_TEXTS}, {VOCABULARY:,} classes"
        rows = [
            {first: "a step, beyond the start"}
            | {f"T = {tokens:,}": round(measured(TEXT, tokens)) for tokens in TOKENS},
            {first: "a tensor of all logits, which there is none of"}
            | {f"T = {tokens:,}": round(tokens * each) for tokens in TOKENS},
        ]
    else:
        first = "MiB beyond the start, ResNet8 width 1"
        rows = [
            {first: f"{name}, B = {options.batch}"}
            | {f"N = {points}": round(measured(name, points, options.batch)) for points in POINTS}
            for name in ENGINES
        ]
    print(table(rows))
    if options.save:
        print(f"\nwrote {write_result(f'{kind}-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
