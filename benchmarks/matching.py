"""Ways to match trained networks, and how long it takes: `python -m benchmarks.matching`.

Pairs of networks are trained from seeds (0, 1), (2, 3), ...; every way starts from the same ends.
The usual way is coordinate descent from b as it is, in a random order of the permutations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import mean, stdev
from typing import Literal

import torch
import tyro
from torch import nn
from tqdm import tqdm

from benchmarks.harness import environment, write_result
from fastgeo import Forward, Path, data, evaluate, keep_pages, match, match_many, models
from fastgeo.app.config import PRESETS
from fastgeo.matching.pair import Objective, descend, start_from
from fastgeo.profiling.measure import headline, table
from fastgeo.symmetry.derive import Symmetries
from fastgeo.train import train_ends

SWEEPS, BATCH, POINTS = 30, 512, 11


@dataclass(frozen=True)
class Options:
    """Matches pairs of trained networks in several ways, or times the usual one."""

    setting: Literal["digits", "cifar10", "speed"] = "digits"
    """digits: the preset's ends; cifar10: ResNet8 of width 0.5; speed: large, untrained networks"""
    pairs: int = 20
    """how many pairs of networks"""
    cifar: str = "cifar10"
    """where CIFAR-10 is from: cifar10 (downloaded) or npz:PATH"""
    images: int = 4000
    """training images of CIFAR-10"""
    epochs: int = 14
    """passes over them"""
    keep: FilePath | None = None
    """file that keeps the trained networks, and from which they are taken if it is there"""
    save: bool = False
    """write benchmarks/results/matching-SETTING.json"""


def ends(options: Options) -> tuple[data.Dataset, nn.Module, list[dict[str, torch.Tensor]]]:
    """The data, a network for it, and the trained states."""
    if options.setting == "digits":
        config, dataset = PRESETS["digits"], data.load("digits")
    else:
        config = PRESETS["cifar10"].changed(width=0.5, epochs=options.epochs)
        dataset = data.load(options.cifar, augment="flip-crop", train_subset=options.images)

    def make() -> nn.Module:
        return models.resnet(8, config.ends.width, in_channels=dataset.image_shape[0])

    if options.keep is not None and options.keep.exists():
        return dataset, make(), torch.load(options.keep, weights_only=True)[: 2 * options.pairs]
    states = []
    for first in range(0, 2 * options.pairs, 8):  # few at a time, to bound the memory
        seeds = range(first, min(first + 8, 2 * options.pairs))
        states += train_ends(
            make, dataset, seeds, config.training, progress=True, forward=Forward(engine="stacked")
        )
    if options.keep is not None:
        torch.save(states, options.keep)
    return dataset, make(), states


Way = Callable[[dict, dict], tuple[dict, int]]


def ways(module: nn.Module, images: torch.Tensor) -> dict[str, Way]:
    """name -> a function of two states that returns the permuted second one, and the sweeps."""
    symmetries = Symmetries(module, images)

    def start(*names: str, sweeps: int = SWEEPS) -> Way:
        def way(a: dict, b: dict) -> tuple[dict, int]:
            assignment = Objective(symmetries.spec, a, b).assignment()
            for name in names:
                start_from(name, assignment, symmetries, a, b, images, seed=0)
            taken = descend(assignment, sweeps, 0, tqdm(disable=True)) if sweeps else 0
            return symmetries.spec.permute(b, assignment.permutations), taken

        return way

    def restarts(count: int) -> Way:
        def way(a: dict, b: dict) -> tuple[dict, int]:
            options = dict(restarts=count, max_sweeps=SWEEPS, module=module)
            matching = match(a, b, images, **options)
            return matching.state_dict, matching.sweeps

        return way

    return {
        "not matched": lambda a, b: (b, 0),
        "usual descent": start(),
        "activations alone": start("activations", sweeps=0),
        "descent from inwards": start("inwards"),
        "descent from activations": start("activations"),
        "relaxed": start("relaxed"),
        "relaxed from activations": start("activations", "relaxed"),
        "restarts=3 (the default)": restarts(3),
        "restarts=10": restarts(10),
    }


def compare(options: Options) -> dict[str, object]:
    """A row for each way: means over the pairs, and how often it is better than the usual one."""
    dataset, module, states = ends(options)
    images, _ = next(iter(dataset.in_order("train", BATCH)))
    splits = {split: next(iter(dataset.in_order(split, 1000))) for split in ("train", "test")}
    found: dict[str, list[dict[str, float]]] = {}
    for a, b in tqdm(list(zip(states[::2], states[1::2], strict=True)), desc="pairs"):
        for name, way in ways(module, images).items():
            started = time.perf_counter()
            matched, sweeps = way(a, b)
            seconds = time.perf_counter() - started
            square = sum((a[key] - matched[key]).double().square().sum().item() for key in a)
            inner = sum((a[key].double() * matched[key].double()).sum().item() for key in a)
            line = evaluate(
                Path.linear(a, matched, POINTS), module, splits, forward=Forward(engine="stacked")
            )
            barriers = {name: split.barrier for name, split in line.splits.items()}
            own = {"objective": inner, "square distance": square, **barriers}
            found.setdefault(name, []).append(own | {"sweeps": sweeps, "seconds": seconds})
    usual = found["usual descent"]
    rows = []
    for name, own in found.items():
        pairs = list(zip(own, usual, strict=True))
        rounding = 1e-9 * abs(usual[0]["objective"])
        rows.append(
            {
                "way": name,
                "objective": _spread(own, "objective", 2),
                "squared distance": _spread(own, "square distance", 1),
                "barrier, train, nats": _spread(own, "train", 3),
                "barrier, test, nats": _spread(own, "test", 3),
                "objective over the usual: higher, lower": (
                    f"{sum(x['objective'] > y['objective'] + rounding for x, y in pairs)}, "
                    f"{sum(x['objective'] < y['objective'] - rounding for x, y in pairs)}"
                ),
                "barrier lower": str(sum(x["train"] < y["train"] for x, y in pairs)),
                "sweeps": f"{mean(x['sweeps'] for x in own):.1f}",
                "seconds": f"{mean(x['seconds'] for x in own):.2f}",
            }
        )
    result = {"pairs": options.pairs, "rows": rows, "found": found}
    if len(states) >= 4:
        result["common frame"] = common_frame(module, images, states[:4], splits["train"])
    return result


def common_frame(module: nn.Module, images: torch.Tensor, states: list, data: tuple) -> dict:
    """Of the first four networks: mean barrier of their six pairs, by `match_many`, and by matching
    three of them to the first."""
    frame = match_many(states, images, module=module, data=data)
    first, *others = states
    matched = [first, *(match(first, b, images, module=module).state_dict for b in others)]
    lines = [Path.linear(matched[i], matched[j], POINTS) for i in range(4) for j in range(i)]
    of_first = [evaluate(line, module, {"data": data}).splits["data"].barrier for line in lines]
    return {
        "mean barrier of all pairs, nats": {
            "as they are": frame.barriers_before.sum().item() / 12,
            "all matched to the first": mean(of_first),
            "match_many": frame.barriers_after.sum().item() / 12,
        },
        "mean inner product of all pairs": {
            "as they are": frame.objectives_before.triu(1).sum().item() / 6,
            "match_many": frame.objectives_after.triu(1).sum().item() / 6,
        },
        "seconds": frame.seconds,
    }


def _spread(own: list[dict[str, float]], key: str, digits: int) -> str:
    values = [x[key] for x in own]
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def vgg16() -> nn.Module:
    """VGG-16 for CIFAR-10: thirteen 3x3 convolutions and three linear layers, without norms."""
    layers, before = [], 3
    for count, channels in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(count):
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
            before = channels
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers, nn.Flatten(), *head)


def speed() -> dict[str, object]:
    """A row for each network: the spec, 30 sweeps of the descent that all improve something or look
    at everything again, and the whole of `match`."""
    networks = {
        "ResNet20 width 4": lambda: models.resnet(20, 4),
        "VGG-16": vgg16,
        "ResNet20 width 16": lambda: models.resnet(20, 16),
    }
    rows = []
    for name, make in networks.items():
        torch.manual_seed(0)
        a, b, x = make(), make(), torch.randn(2, 3, 32, 32)
        started = time.perf_counter()
        symmetries = Symmetries(a, x)
        spec_seconds = time.perf_counter() - started
        assignment = Objective(symmetries.spec, a.state_dict(), b.state_dict()).assignment()
        started = time.perf_counter()
        for _ in range(SWEEPS):
            for family in assignment.families:
                assignment.improve(family)
        sweep_seconds = time.perf_counter() - started
        counts = (1, 3) if name == "ResNet20 width 4" else (1,)  # of the others it takes minutes
        seconds = {count: match(a, b, x, restarts=count).seconds for count in counts}
        rows.append(
            {
                "network": name,
                "parameters": f"{sum(p.numel() for p in a.parameters()):,}",
                "permutations": str(len(symmetries.spec.channels)),
                "spec, s": f"{spec_seconds:.2f}",
                "30 sweeps, s": f"{sweep_seconds:.2f}",
                "match, restarts=1, s": f"{seconds[1]:.2f}",
                "match, s": f"{seconds[3]:.2f}" if 3 in seconds else "-",
            }
        )
        print(table(rows[-1:]), flush=True)
    return {"rows": rows}


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.matching")
    keep_pages()
    print(headline(environment()))
    result = speed() if options.setting == "speed" else compare(options)
    print(table(result["rows"]))
    if "common frame" in result:
        print(result["common frame"])
    if options.save:
        print(f"\nwrote {write_result(f'matching-{options.setting}', result)}")


if __name__ == "__main__":
    main()
