"""Whole runs in bf16 against fp32: `python -m benchmarks.precision`.

One path is optimised in fp32 over several orders of the images, and in the other precisions over
the first of them. What a precision changes in energies and losses is set against what another
order changes. With --networks it is the training of the ends that is compared, over their seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import ends
from benchmarks.harness import RESULTS, device_slug, environment, write_result
from fastgeo import Forward, Path, evaluate, keep_pages, optimize
from fastgeo.app.config import PRESETS
from fastgeo.app.given import Given
from fastgeo.figures import PALETTE, Style, write_figure
from fastgeo.profiling.measure import headline, table
from fastgeo.train import train_ends

SMOOTH = 10  # steps
STYLES = {"fp32": PALETTE[0], "bf16": PALETTE[1], "tf32": PALETTE[3]}


@dataclass(frozen=True)
class Options(ends.Options):
    """Energies along a run and barriers behind it, in fp32, TF32 (on a GPU) and bf16."""

    steps: int | None = None
    """the preset's by default"""
    orders: int = 4
    """of the images, in fp32; two at least"""
    networks: int | None = None
    """train so many networks in each precision instead, from the seeds 0, 1, ...; three at least"""
    save: bool = False
    """write benchmarks/results/precision-PRESET-DEVICE.json and .png, or precision-ends-..."""


def curve(between: ends.Ends, precision: str, seed: int) -> dict[str, Tensor]:
    """Of one run: energies [steps], and of the path behind it losses [N] and energy in fp32."""
    c, energies = between.config, []
    path = optimize(
        *(between.line(c.path.points), between.module, between.batches(seed)),
        steps=c.path.steps,
        descent=c.descent,
        forward=Forward(engine="stacked", precision=precision),
        on_step=lambda metrics, _: energies.append(metrics["energy"]),
        progress=True,
    )
    train = {"train": between.dataset.in_order("train", c.evaluation.eval_batch_size)}
    found = evaluate(path, between.module, train, forward=Forward(engine="stacked"))
    return {
        "energy of a step": torch.tensor(energies),
        "train loss": torch.tensor(found.splits["train"].loss),
        "barrier": torch.tensor([found.splits["train"].barrier]),
        "energy": torch.tensor([found.energy]),
    }


def compared(orders: list[dict[str, Tensor]], others: dict[str, dict[str, Tensor]]) -> list[dict]:
    """A row for each curve and precision: how far it is, in the mean, from fp32 over the first
    order of the images, and how far the other orders are.

    Args:
        orders: curves of fp32, two or more.
        others: precision -> curves over the first order.
    """

    def away(result: dict[str, Tensor], key: str) -> float:
        return (result[key] - orders[0][key]).abs().mean().item()

    rows: list[dict[str, Any]] = []
    for key, first in orders[0].items():
        of_orders = [away(order, key) for order in orders[1:]]
        for precision, result in others.items():
            row = {"nats": key, "precision": precision, "fp32": f"{first.mean():.4g}"}
            row["from fp32"] = f"{away(result, key):.2g}"
            row["another order from fp32"] = f"{sum(of_orders) / len(of_orders):.2g}"
            rows.append(row | {"least to most": f"{min(of_orders):.2g} to {max(of_orders):.2g}"})
    return rows


def trained(preset: str, precision: str, seeds: range) -> dict[str, list[float]]:
    """Of networks that were trained in a precision: losses and accuracies, evaluated in fp32."""
    given = Given(PRESETS[preset])
    c, data, module = given.config, given.dataset, given.new_module().to(given.device)
    forward = Forward(engine="stacked", precision=precision)
    states = train_ends(given.new_module, data, seeds, c.training, forward=forward, progress=True)
    between = {name: torch.stack([one[name] for one in states[1:-1]]) for name in states[0]}
    networks = Path(states[0], between, states[-1])
    splits = {name: data.in_order(name, c.evaluation.eval_batch_size) for name in ("train", "test")}
    found = evaluate(networks, module, splits, forward=Forward(engine="stacked")).splits
    return {
        "train loss, nats": found["train"].loss,
        "test loss, nats": found["test"].loss,
        "test accuracy, %": [100 * share for share in found["test"].accuracy],
    }


def compared_ends(found: dict[str, dict[str, list[float]]]) -> Iterator[dict[str, Any]]:
    """A row for each quantity and precision: mean ± standard deviation over the seeds, and the mean
    difference from fp32, seed by seed, ± its standard error."""
    for key in found["fp32"]:
        exact = torch.tensor(found["fp32"][key])
        for precision in found:
            own = torch.tensor(found[precision][key])
            away, count = own - exact, len(own)
            error = away.std() / count**0.5
            difference = "-" if precision == "fp32" else f"{away.mean():.2g} ± {error:.2g}"
            yield {
                f"{count} networks": key,
                "precision": precision,
                "over the seeds": f"{own.mean():.4g} ± {own.std():.2g}",
                "less fp32's": difference,
            }


def figure(orders: list[dict[str, Tensor]], others: dict[str, dict[str, Tensor]]) -> Figure:
    """Energies over the steps, the mean of `SMOOTH`, and the loss along the path behind them."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    axes = drawn.subplots(1, 2)
    grey = Style("0.75", "", "-")
    lines = [("fp32, other orders of the images", grey, order) for order in orders[:0:-1]]
    lines.append(("fp32", STYLES["fp32"], orders[0]))
    lines += [(f"{p}, the same order", STYLES[p], result) for p, result in others.items()]
    for name, style, result in lines:
        energies, loss = result["energy of a step"], result["train loss"]
        energies = energies.unfold(0, window := min(SMOOTH, len(energies)), 1).mean(1)
        how = dict(color=style.colour, linestyle=style.dashes, linewidth=1.2, label=name)
        axes[0].plot(range(window - 1, window - 1 + len(energies)), energies, **how)
        axes[1].plot(torch.linspace(0, 1, len(loss)), loss, **how)
    axes[0].set(xlabel="step", ylabel=f"energy, mean of {SMOOTH} batches, nats", yscale="log")
    axes[1].set(xlabel="t along the path", ylabel="train loss, nats", ylim=(0, None))
    labels = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    drawn.legend(labels.values(), labels, loc="outside lower center", ncols=3, frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.precision", description=__doc__)
    if options.orders < 2:
        raise SystemExit(f"--orders must be at least 2, got {options.orders}")
    if options.networks is not None and options.networks < 3:
        raise SystemExit(f"--networks must be at least 3, got {options.networks}")
    keep_pages()
    print(headline(environment()), end="\n\n", flush=True)
    reduced = ["tf32", "bf16"] if torch.cuda.is_available() else ["bf16"]
    if options.networks is not None:
        seeds = range(options.networks)
        found = {p: trained(options.preset, p, seeds) for p in ("fp32", *reduced)}
        rows = list(compared_ends(found))
        print(table(rows))
        if options.save:
            name = f"precision-ends-{options.preset}-{device_slug()}"
            print(f"\nwrote {write_result(name, {'rows': rows, 'networks': found})}")
        return
    between = ends.Ends(options)
    orders = [curve(between, "fp32", seed) for seed in range(options.orders)]
    others = {precision: curve(between, precision, 0) for precision in reduced}
    rows = compared(orders, others)
    print(table(rows))
    if options.save:
        curves = {"fp32": orders, **{p: [r] for p, r in others.items()}}
        curves = {
            p: [{k: t.tolist() for k, t in r.items()} for r in rs] for p, rs in curves.items()
        }
        name, payload = f"precision-{options.preset}-{device_slug()}", {"curves": curves}
        write_figure(RESULTS / f"{name}.png", figure(orders, others))
        payload = {"setting": between.setting, "orders": options.orders, "rows": rows} | payload
        print(f"\nwrote {write_result(name, payload)}")


if __name__ == "__main__":
    main()
