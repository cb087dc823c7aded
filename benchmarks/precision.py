"""Whole runs in bf16 against fp32: `python -m benchmarks.precision`.

One path is optimised in fp32 over several orders of the images, and in the other precisions over
the first of them. What a precision changes in energies and losses is set against what another
order changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import tyro
from torch import Tensor, nn

from benchmarks.harness import device_slug, environment, write_result
from fastgeo import Path, data, evaluate, keep_pages, match, models, optimize
from fastgeo.config import PRESETS
from fastgeo.measure import headline, table
from fastgeo.train import train_ends


@dataclass(frozen=True)
class Options:
    """Energies along a run and barriers behind it, in fp32, TF32 (on a GPU) and bf16."""

    preset: str = "digits"
    """digits, paper-small, cifar10 or paper"""
    data: str | None = None
    """as of `fastgeo run`; the preset's by default"""
    steps: int | None = None
    """the preset's by default"""
    orders: int = 4
    """of the images, in fp32"""
    save: bool = False
    """write benchmarks/results/precision-PRESET-DEVICE.json"""


def curve(
    path: Path, module: nn.Module, dataset: data.Dataset, config, precision: str, seed: int
) -> dict[str, Tensor]:
    """Of one run: energies [steps], and of the path behind it losses [N] and energy in fp32."""
    energies: list[float] = []
    path = optimize(
        *(path, module, dataset.shuffled(config.batch_size, torch.Generator().manual_seed(seed))),
        **{**config.descent, "precision": precision},
        engine="stacked",
        on_step=lambda metrics, _: energies.append(metrics["energy"]),
    )
    found = evaluate(path, module, {"train": dataset.in_order("train", 256)}, engine="stacked")
    return {
        "energy of a step": torch.tensor(energies),
        "train loss": torch.tensor(found.splits["train"].loss),
        "barrier": torch.tensor([found.splits["train"].barrier]),
        "energy": torch.tensor([found.energy]),
    }


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.precision")
    keep_pages()
    config = PRESETS[options.preset]
    config = replace(config, data=options.data or config.data, steps=options.steps or config.steps)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    how = dict(augment=config.augment, train_subset=config.train_subset)
    dataset = data.load(config.data, **how).to(device)
    channels = dataset.image_shape[0]

    def make() -> nn.Module:
        depth = int(config.model.removeprefix("resnet"))
        return models.resnet(depth, config.width, in_channels=channels, norm=config.norm)

    print(headline(environment()), end="\n\n", flush=True)
    a, b = train_ends(make, dataset, (config.seed_a, config.seed_b), config)
    module = make().to(device)
    images = dataset.batch(torch.arange(8, device=device))
    start = Path.linear(a, match(a, b, images, module=module).state_dict, config.points)
    run: Callable[[str, int], dict] = lambda precision, seed: curve(  # noqa: E731
        start, module, dataset, config, precision, seed
    )
    orders = [run("fp32", seed) for seed in range(options.orders)]
    others = {p: run(p, 0) for p in (["tf32"] if device == "cuda" else []) + ["bf16"]}
    rows = []
    for key, first in orders[0].items():
        of_orders = torch.stack([order[key] for order in orders])
        spread = of_orders.amax(0) - of_orders.amin(0)
        for precision, result in others.items():
            away = (result[key] - first).abs()
            rows.append(
                {
                    "nats": key,
                    "precision": precision,
                    "fp32, mean": f"{first.mean():.4g}",
                    "mean difference from fp32": f"{away.mean():.2g}",
                    "mean spread of the orders": f"{spread.mean():.2g}",
                    "within it": f"{(away <= spread).double().mean():.0%}",
                }
            )
    print(table(rows))
    if options.save:
        curves = {"fp32": orders, **{p: [r] for p, r in others.items()}}
        curves = {
            p: [{k: t.tolist() for k, t in r.items()} for r in rs] for p, rs in curves.items()
        }
        name = f"precision-{options.preset}-{device_slug()}"
        print(f"\nwrote {write_result(name, {'rows': rows, 'curves': curves})}")


if __name__ == "__main__":
    main()
