"""Energy reached against steps and seconds: `python -m benchmarks.convergence`.

Plain SGD (Tan et al.), the preconditioned step, and on top of it a falling rate, momentum, and few
points before many, from the same matched line between two networks, each at several learning rates,
so that each is seen at its best. The engine is the same for all.
"""

import time
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.ends import Ends, Options
from benchmarks.harness import RESULTS, environment, write_result
from fastgeo import Descent, Forward, Path, evaluate, keep_pages, optimize
from fastgeo.figures import write_figure
from fastgeo.profiling.measure import headline, table

PLAIN = Descent(momentum=0.0, lr_schedule="constant", precondition=False, coarse_to_fine=False)
PRECONDITIONED = replace(PLAIN, precondition=True)
FALLING = dict(lr_schedule="linear")
MOMENTUM = dict(momentum=0.9, **FALLING)
METHODS = {
    "plain SGD": PLAIN,
    "plain SGD, falling rate, momentum": replace(PLAIN, **MOMENTUM),
    "preconditioned": PRECONDITIONED,
    "preconditioned, falling rate": replace(PRECONDITIONED, **FALLING),
    "preconditioned, falling rate, momentum": replace(PRECONDITIONED, **MOMENTUM),
    "coarse to fine": replace(PRECONDITIONED, coarse_to_fine=True),
    "coarse to fine, falling rate, momentum": Descent(),
}
STACKED = Forward(engine="stacked")
RATES = (0.1, 0.2, 0.4, 0.8)
MOMENTUM_RATES = (0.025, 0.05, 0.1, 0.2)  # in the long run, momentum makes ten times as much
FOUND = (
    *("energy, nats", "Σ√JSD", "Fisher-Rao, rad"),
    *("highest train loss", "between the points", "barrier, train", "test"),
)
TEST_IMAGES = 2048  # at most
SMOOTH = 5  # steps
DRAWN = ("sqrt_jsd", "seconds")  # of a step
# Colours that differ in grey, too, and for colour-blind eyes (Okabe and Ito).
COLOURS = {"plain SGD": "black", "preconditioned": "#e69f00", "coarse to fine": "#0072b2"}
DASHES = {"": "-", "falling rate": "--", "falling rate, momentum": ":"}


class Bench(Ends):
    """What optimisations between two ends reach, on their data."""

    def __init__(self, options: Options):
        super().__init__(options)
        size = self.config.evaluation.eval_batch_size
        test = islice(self.dataset.in_order("test", size), max(1, TEST_IMAGES // size))
        self.splits = {"train": self.dataset.in_order("train", size), "test": list(test)}

    def row(self, points: int, descent: Descent) -> dict[str, Any]:
        """What one optimisation reaches, with the course of energies and seconds."""
        course: list[dict[str, float]] = []

        def on_step(metrics: dict, path: Path) -> None:
            course.append({**metrics, "seconds": time.perf_counter() - started})

        line, row = self.line(points), {}
        batches = self.batches(self.config.path.path_seed)
        started = time.perf_counter()
        try:
            path = optimize(
                *(line, self.module, batches),
                steps=self.config.path.steps,
                descent=descent,
                forward=STACKED,
                on_step=on_step,
                progress=True,
            )
            row["seconds"] = time.perf_counter() - started
            row |= self._found(path)
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            row |= dict.fromkeys(("seconds", *FOUND), "diverged")
        return row | {"course": course}

    def before(self, points: int) -> dict[str, Any]:
        """The matched line."""
        return self._found(self.line(points))

    def _found(self, path: Path) -> dict[str, float]:
        found = evaluate(path, self.module, self.splits, forward=STACKED)
        fine, train = path.resample(2 * len(path) - 1), {"train": self.splits["train"]}
        between = evaluate(fine, self.module, train, forward=STACKED).splits["train"].loss[1::2]
        values = (
            *(found.energy, found.sqrt_jsd, found.fisher_rao),
            *(max(found.splits["train"].loss), max(between)),
            *(found.splits["train"].barrier, found.splits["test"].barrier),
        )
        return dict(zip(FOUND, values, strict=True))


def methods(bench: Bench) -> list[dict[str, Any]]:
    """A row for each method and rate."""
    rows = []
    for name, descent in METHODS.items():
        for lr in MOMENTUM_RATES if descent.momentum else RATES:
            row = bench.row(bench.config.path.points, replace(descent, lr=lr))
            rows.append({"step": name, "rate": lr, **row})
    return rows


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The row of each method with its lowest energy; none of one that diverges at every rate."""
    found = []
    for name in METHODS:
        own = [r for r in rows if r["step"] == name and r["energy, nats"] != "diverged"]
        found += sorted(own, key=lambda row: row["energy, nats"])[:1]
    return found


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with so much of their courses as the figure shows."""
    drawn = best(rows)
    return [
        {
            **row,
            "course": [
                {name: float(f"{line[name]:.5g}") for name in DRAWN}
                for line in row["course"]
                if row in drawn
            ],
        }
        for row in rows
    ]


def reached(rows: list[dict[str, Any]]) -> str:
    """Where each method ends, at its best rate."""
    parts = [
        f"{row['step']} at its best rate, {row['rate']:g}, ends at {row['energy, nats']:.3g} nats "
        f"after {row['seconds']:.0f} s"
        for row in best(rows)
    ]
    return "; ".join(parts) + "."


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Σ√JSD, the mean of `SMOOTH` batches, against steps and against seconds; of few points it is
    somewhat less than of many."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.subplots(1, 2, sharey=True)
    for row in best(rows):
        lengths = torch.tensor([line["sqrt_jsd"] for line in row["course"]])
        window = min(SMOOTH, len(lengths))
        lengths = lengths.unfold(0, window, 1).mean(1)
        seconds = [line["seconds"] for line in row["course"]][window - 1 :]
        kind, _, schedule = row["step"].partition(", ")
        look = dict(color=COLOURS[kind], linestyle=DASHES[schedule], linewidth=1.5)
        axes[0].plot(range(window - 1, len(row["course"])), lengths, **look)
        axes[1].plot(seconds, lengths, label=f"{row['step']}, rate {row['rate']:g}", **look)
    axes[0].set(xlabel="step", ylabel=f"Σ√JSD, mean of {SMOOTH} batches, √nats", yscale="log")
    axes[1].set_xlabel("seconds")
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.convergence", description=__doc__)
    keep_pages()
    print(headline(environment()), flush=True)
    bench = Bench(options)
    rows = methods(bench)
    print(table([{k: v for k, v in row.items() if k != "course"} for row in rows]))
    print(f"\n{reached(rows)}", flush=True)
    if options.save:
        name = f"convergence-{options.preset}"
        write_figure(RESULTS / f"{name}.png", figure(rows))
        print(f"\nwrote {write_result(name, {'setting': bench.setting, 'rows': thinned(rows)})}")


if __name__ == "__main__":
    main()
