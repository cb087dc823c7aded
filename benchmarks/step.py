"""The optimisation step against the loop over N modules: `python -m benchmarks.step`.

The loop is the paper's: N modules evaluated one after the other, the divergence of each pair by
softmax, log and kl_div, one backward pass, SGD on the interior. Both do the same steps on the same
batch; the networks that they end with are compared before a time is printed.
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

from benchmarks.harness import (
    device_slug,
    environment,
    headline,
    quantiles,
    table,
    time_alternating,
    write_result,
)
from fastgeo import Path, keep_pages, models, optimize

SETTINGS = {  # depth, width, channels, pixels, N, B
    "digits preset": (8, 0.5, 1, 8, 25, 128),
    "ResNet8 width 1": (8, 1, 3, 32, 7, 128),
    "ResNet20 width 1": (20, 1, 3, 32, 25, 16),
}


@dataclass(frozen=True)
class Options:
    """Times the step of fastgeo and of the loop over modules."""

    setting: str = "digits preset"
    """digits preset, ResNet8 width 1, ResNet20 width 1, or all"""
    steps: int = 3
    """steps in one measurement"""
    repeats: int = 15
    """measurements of each"""
    keep_pages: bool = True
    """let malloc reuse large blocks, as the command line does (see fastgeo.keep_pages)"""
    save: bool = False
    """write benchmarks/results/step-DEVICE.json"""


def loop(module, path: Path, x: torch.Tensor, steps: int, lr: float) -> list[dict]:
    """The paper's optimisation: returns the N state dicts after some steps."""
    networks = []
    for point in path.points():
        network = copy.deepcopy(module)
        network.load_state_dict(point)
        networks.append(network)
    interior = [parameter for network in networks[1:-1] for parameter in network.parameters()]
    optimizer = torch.optim.SGD(interior, lr)
    for _ in range(steps):
        p = [network(x).softmax(-1) for network in networks]
        energy = 0
        for left, right in zip(p[:-1], p[1:], strict=True):
            middle = ((left + right) / 2).log()
            divergences = [F.kl_div(middle, q, reduction="batchmean") for q in (left, right)]
            energy = energy + sum(divergences) / 2
        optimizer.zero_grad()
        energy.backward()
        optimizer.step()
    return [network.state_dict() for network in networks]


def measure(name: str, options: Options, device: str) -> list[dict]:
    """A row for each implementation."""
    depth, width, channels, pixels, points, batch = SETTINGS[name]
    torch.manual_seed(0)
    module, a, b = (models.resnet(depth, width, in_channels=channels).to(device) for _ in range(3))
    path = Path.linear(a, b, points)
    x = torch.randn(batch, channels, pixels, pixels, device=device)

    def stacked(precondition=False):
        return optimize(path, module, [x], steps=options.steps, precondition=precondition)

    naive = loop(module, path, x, options.steps, 0.1)
    error = max(
        (one[key] - other[key]).abs().max().item()
        for one, other in zip(stacked().points(), naive, strict=True)
        for key in one
    )
    moved = max(
        (one[key] - other[key]).abs().max().item()
        for one, other in zip(path.points(), naive, strict=True)
        for key in one
    )
    if not error < 1e-2 * moved:
        raise SystemExit(f"{name}: wrong; weights differ by {error:.1e}, moved by {moved:.1e}")

    functions = {
        "loop over modules": lambda: loop(module, path, x, options.steps, 0.1),
        "fastgeo": stacked,
        "fastgeo, preconditioned": lambda: stacked(True),
    }
    seconds = time_alternating(functions, options.repeats)
    rows = []
    for implementation, each in seconds.items():
        ratios = [n / s for n, s in zip(seconds["loop over modules"], each, strict=True)]
        ms = {key: 1e3 * value / options.steps for key, value in quantiles(each).items()}
        ratio = quantiles(ratios)
        rows.append(
            {
                "setting": f"{name}, N = {points}, B = {batch}",
                "implementation": implementation,
                "ms a step (p20/p50/p80)": "/".join(f"{v:.1f}" for v in ms.values()),
                "images·points/s": round(1e3 * points * batch / ms["p50"]),
                "times the loop (p20/p50/p80)": "/".join(f"{v:.2f}" for v in ratio.values()),
                "largest difference of a weight": f"{error:.1e} of {moved:.1e} moved",
            }
        )
    return rows


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.keep_pages:
        keep_pages()
    names = list(SETTINGS) if options.setting == "all" else [options.setting]
    if unknown := set(names) - set(SETTINGS):
        raise SystemExit(f"setting must be all or one of {', '.join(SETTINGS)}, got {unknown}")
    print(headline(environment()))
    rows = [row for name in names for row in measure(name, options, device)]
    print(table(rows))
    if options.save:
        print(f"\nwrote {write_result(f'step-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
