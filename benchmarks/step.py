"""The optimisation step against what users would set up: `python -m benchmarks.step`.

The loop is the paper's: N modules evaluated one after the other, the divergence of each pair by
softmax, log and kl_div, one backward pass, SGD on the interior. It is timed as it is, with modules
and images in channels-last, with compiled modules, and with the modules under torch.func.vmap.
All do the same steps on the same batch, and all end at the same weights, or are called wrong.
"""

import copy
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import nn

from benchmarks.harness import (
    device_slug,
    environment,
    headline,
    quantiles,
    table,
    write_result,
)
from fastgeo import Path, keep_pages, models, optimize

SETTINGS = {  # depth, width, channels, pixels, N, B
    "digits preset": (8, 0.5, 1, 8, 25, 128),
    "ResNet8 width 0.5": (8, 0.5, 3, 32, 9, 128),
    "ResNet8 width 1": (8, 1, 3, 32, 7, 128),
    "ResNet20 width 1": (20, 1, 3, 32, 25, 16),
    "ResNet20 width 4": (20, 4, 3, 32, 5, 16),
}
GRID = {  # name -> depth, width, channels, pixels, N, B
    f"ResNet8 width {width:g}, {pixels}x{pixels}, N = {n}, B = {b}": (8, width, 3, pixels, n, b)
    for pixels, widths in ((8, (0.5, 1, 4)), (32, (0.5, 1, 2)))
    for width in widths
    for n in (5, 25)
    for b in (16, 128)
    if pixels == 8 or n * b * width <= 25 * 64
}


@dataclass(frozen=True)
class Options:
    """Times the step of fastgeo, of the loop over modules, and of its usual improvements."""

    setting: str = "digits preset"
    """digits preset, ResNet8 width 0.5, ResNet8 width 1, ResNet20 width 1, ResNet20 width 4, all of
    these, or grid: (width, N, B), fastgeo against the loop only"""
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


@dataclass(frozen=True)
class Result:
    """After some steps: the N state dicts, and seconds a step of all but the first."""

    points: list[dict[str, torch.Tensor]]
    seconds: float


LR = 0.1


def loop(
    module: nn.Module,
    path: Path,
    x: torch.Tensor,
    steps: int,
    *,
    channels_last: bool = False,
    forward: Callable[[nn.Module], Callable] = lambda network: network,
) -> Result:
    """The paper's optimisation."""
    networks = []
    for point in path.points():
        network = copy.deepcopy(module)
        network.load_state_dict(point)
        networks.append(network)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
    interior = [parameter for network in networks[1:-1] for parameter in network.parameters()]
    optimizer = torch.optim.SGD(interior, LR)
    evaluate = [forward(network) for network in networks]
    times = []
    for _ in range(steps + 1):
        p = [network(x).softmax(-1) for network in evaluate]
        optimizer.zero_grad()
        _energy(p).backward()
        optimizer.step()
        times.append(_now())
    return Result([network.state_dict() for network in networks], (times[-1] - times[0]) / steps)


def vmapped(module: nn.Module, path: Path, x: torch.Tensor, steps: int) -> Result:
    """The paper's optimisation with all networks under torch.func.vmap."""
    params = {name: t.clone().requires_grad_() for name, t in path.stacked().items()}
    optimizer = torch.optim.SGD(list(params.values()), LR)

    def one(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(module, params, (x,))

    times = []
    for _ in range(steps + 1):
        p = torch.vmap(one)(params).softmax(-1).unbind(0)
        optimizer.zero_grad()
        _energy(p).backward()
        for parameter in params.values():
            parameter.grad[[0, -1]] = 0  # the ends stay
        optimizer.step()
        times.append(_now())
    points = [{k: v[i].detach() for k, v in params.items()} for i in range(len(path))]
    return Result(points, (times[-1] - times[0]) / steps)


def fastgeo(
    module: nn.Module, path: Path, x: torch.Tensor, steps: int, *, precondition: bool, **engine
) -> Result:
    """fastgeo's optimisation with an engine that is known."""
    times, on_path = [], []

    def on_step(metrics: dict, path: Path) -> None:
        times.append(_now())
        on_path[:] = [path]

    optimize(
        *(path, module, [x]),
        steps=steps + 2,
        lr=LR,
        precondition=precondition,
        on_step=on_step,
        **engine,
    )
    # Between the first and the last call there are steps + 1 whole steps, one of them to warm up.
    return Result(list(on_path[0].points()), (times[-1] - times[1]) / steps)


def chosen_engine(module: nn.Module, path: Path, x: torch.Tensor) -> dict:
    """What engine="auto" chooses, as options of `optimize`."""
    choices: list[dict] = []
    optimize(path, module, [x], steps=12, on_choice=choices.append)
    return {name: choices[0][name] for name in ("engine", "channels_last", "chunk")}


def measure(name: str, options: Options, device: str) -> list[dict]:
    """A row for each implementation."""
    depth, width, channels, pixels, points, batch = (SETTINGS | GRID)[name]
    torch.manual_seed(0)
    module, a, b = (models.resnet(depth, width, in_channels=channels).to(device) for _ in range(3))
    path = Path.linear(a, b, points)
    x = torch.randn(batch, channels, pixels, pixels, device=device)
    engine = chosen_engine(module, path, x)

    run = functools.partial
    functions = {"loop over modules": loop}
    if name in SETTINGS:
        functions |= {
            "loop, channels-last": run(loop, channels_last=True),
            "torch.func.vmap": vmapped,
            "fastgeo, stacked": run(fastgeo, precondition=False, engine="stacked"),
        }
        if options.compiled:
            compiled = torch.compile(module)
            functions["loop, compiled"] = run(loop, forward=lambda n: _compiled(compiled, n))
    functions["fastgeo, auto"] = run(fastgeo, precondition=False, **engine)

    steps = options.steps
    start, expected = list(path.points()), loop(module, path, x, steps).points
    moved = _difference(start, expected)
    errors = {
        n: _difference(f(module, path, x, steps).points, expected) for n, f in functions.items()
    }
    functions["fastgeo, auto, preconditioned"] = run(fastgeo, precondition=True, **engine)
    seconds = {name: [] for name in functions}
    for turn in range(options.repeats):
        for implementation in list(functions)[:: 1 if turn % 2 == 0 else -1]:
            result = functions[implementation](module, path, x, steps)
            seconds[implementation].append(result.seconds)
    rows = []
    for implementation, each in seconds.items():
        ms = {key: 1e3 * value for key, value in quantiles(each).items()}
        ratios = [n / s for n, s in zip(seconds["loop over modules"], each, strict=True)]
        ratio = "/".join(f"{value:.2f}" for value in quantiles(ratios).values())
        error = errors.get(implementation, 0.0)
        wrong = not error < 1e-2 * moved
        label = implementation
        if implementation == "fastgeo, auto":
            label += f" ({_engine(engine)})"
        rows.append(
            {
                "setting": f"{name}, N = {points}, B = {batch}" if name in SETTINGS else name,
                "implementation": label,
                "ms a step (p20/p50/p80)": "/".join(f"{value:.1f}" for value in ms.values()),
                "images·points/s": round(1e3 * points * batch / ms["p50"]),
                "times the loop (p20/p50/p80)": "wrong" if wrong else ratio,
                "largest difference of a weight": f"{error:.1e} of {moved:.1e} moved"
                if implementation in errors
                else "other steps",
            }
        )
    return rows


def _energy(p: list[torch.Tensor]) -> torch.Tensor:
    """The sum of the Jensen-Shannon divergences of neighbours, as the paper's code has it."""
    energy = 0
    for left, right in zip(p[:-1], p[1:], strict=True):
        middle = ((left + right) / 2).log()
        divergences = [F.kl_div(middle, q, reduction="batchmean") for q in (left, right)]
        energy = energy + sum(divergences) / 2
    return energy


def _compiled(compiled: nn.Module, network: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """One compiled graph for all networks, each with its own parameters."""
    params = {f"_orig_mod.{name}": p for name, p in network.named_parameters()}
    return lambda x: torch.func.functional_call(compiled, params, (x,))


def _difference(points: list[dict], others: list[dict]) -> float:
    """The largest of a weight."""
    return max(
        (one[key] - other[key]).abs().max().item()
        for one, other in zip(points, others, strict=True)
        for key in one
    )


def _engine(engine: dict) -> str:
    layout = ", channels-last" if engine["channels_last"] else ""
    chunk = f", {engine['chunk']} at a time" if engine["chunk"] else ""
    return f"{engine['engine']}{layout}{chunk}"


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.step")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.keep_pages:
        keep_pages()
    names = {"all": list(SETTINGS), "grid": list(GRID)}.get(options.setting, [options.setting])
    if unknown := set(names) - set(SETTINGS) - set(GRID):
        raise SystemExit(
            f"setting must be all, grid or one of {', '.join(SETTINGS)}, got {', '.join(unknown)}"
        )
    print(headline(environment()))
    rows = [row for name in names for row in measure(name, options, device)]
    print(table(rows))
    if options.save:
        name = "step-grid" if options.setting == "grid" else "step"
        print(f"\nwrote {write_result(f'{name}-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
