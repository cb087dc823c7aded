"""Energy reached against steps and seconds: `python -m benchmarks.convergence`.

Plain SGD (Tan et al.) and the preconditioned step from the same matched line between two networks,
each at several learning rates, so that each is seen at its best. The engine is the same for all.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.harness import RESULTS, environment, write_result
from fastgeo import Path, evaluate, keep_pages, match, optimize
from fastgeo.config import PRESETS
from fastgeo.files import write_figure
from fastgeo.measure import headline, table
from fastgeo.run import Run
from fastgeo.train import train_ends

RATES = {False: (0.05, 0.1, 0.2), True: (0.05, 0.1, 0.2)}  # preconditioned or not


@dataclass(frozen=True)
class Options:
    """Optimises one line by SGD and by the preconditioned step at several rates."""

    preset: str = "digits"
    """whose ends, data and path"""
    steps: int = 100
    """optimisation steps of each"""
    save: bool = False
    """write benchmarks/results/convergence-PRESET.json and .png"""


def measure(preset: str, steps: int) -> list[dict[str, Any]]:
    """A row for each method and rate, with the course of the energy in "energies"."""
    run = Run(FilePath(), replace(PRESETS[preset], steps=steps))
    c = run.config
    a, b = train_ends(run.new_module, run.dataset, c.seeds, c, engine="stacked", progress=True)
    module = run.new_module()
    matched = match(a, b, module=module, restarts=c.match_restarts).state_dict
    line = Path.linear(a, matched, c.points)
    splits = {name: run.dataset.in_order(name, c.eval_batch_size) for name in ("train", "test")}
    rows = []
    for precondition, rates in RATES.items():
        for lr in rates:
            energies: list[float] = []
            seconds: list[float] = []

            def on_step(metrics: dict, path: Path, e=energies, s=seconds) -> None:
                e.append(metrics["energy"])
                s.append(time.perf_counter())

            generator = torch.Generator().manual_seed(c.path_seed)
            row: dict[str, Any] = {
                "step": "preconditioned" if precondition else "plain SGD",
                "rate": lr,
            }
            try:
                path = optimize(
                    *(line, module, run.dataset.shuffled(c.batch_size, generator)),
                    steps=steps,
                    lr=lr,
                    precondition=precondition,
                    engine="stacked",
                    on_step=on_step,
                    progress=True,
                )
                found = evaluate(path, module, splits, engine="stacked")
                row |= {
                    "energy, nats": found.energy,
                    "Σ√JSD": found.sqrt_jsd,
                    "highest train loss": max(found.splits["train"].loss),
                    "highest test loss": max(found.splits["test"].loss),
                }
            except ValueError:  # it diverged
                names = ("energy, nats", "Σ√JSD", "highest train loss", "highest test loss")
                row |= dict.fromkeys(names, "diverged")
            row["ms a step"] = 1e3 * (seconds[-1] - seconds[0]) / max(len(seconds) - 1, 1)
            rows.append(row | {"energies": energies})
    return rows


def reached(rows: list[dict[str, Any]]) -> str:
    """How long the preconditioned step takes to where plain SGD ends, each at its best."""
    best = {
        kind: min(
            (row for row in rows if row["step"] == kind and row["energy, nats"] != "diverged"),
            key=lambda row: row["energy, nats"],
        )
        for kind in ("plain SGD", "preconditioned")
    }
    goal = best["plain SGD"]["energies"][-10:]
    goal = sum(goal) / len(goal)
    energies = best["preconditioned"]["energies"]
    step = next((i for i, energy in enumerate(energies) if energy <= goal), None)
    if step is None:
        return "The preconditioned step does not reach the energy at which plain SGD ends."
    count = len(best["plain SGD"]["energies"])
    return (
        f"Plain SGD at its best rate ends at {goal:.4f} nats after {count} steps; the "
        f"preconditioned step is below that after {step}."
    )


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Energy against steps and against seconds."""
    drawn = Figure(figsize=(10, 4), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for row in rows:
        x = range(len(row["energies"]))
        color = "tab:orange" if row["step"] == "preconditioned" else "tab:blue"
        rates = sorted(r["rate"] for r in rows if r["step"] == row["step"])
        style = (":", "--", "-")[rates.index(row["rate"])]
        label = f"{row['step']}, rate {row['rate']:g}"
        axes[0].plot(x, row["energies"], style, color=color, label=label)
        axes[1].plot([i * row["ms a step"] / 1e3 for i in x], row["energies"], style, color=color)
    axes[0].set(xlabel="step", ylabel="energy of a batch, nats", yscale="log")
    axes[1].set_xlabel("seconds")
    axes[0].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.convergence")
    keep_pages()
    print(headline(environment()), flush=True)
    rows = measure(options.preset, options.steps)
    print(table([{k: v for k, v in row.items() if k != "energies"} for row in rows]))
    print(f"\n{reached(rows)}")
    if options.save:
        name = f"convergence-{options.preset}"
        write_figure(RESULTS / f"{name}.png", figure(rows))
        print(f"\nwrote {write_result(name, {'rows': rows})}")


if __name__ == "__main__":
    main()
