"""Geodesics beside curve finding: `python -m benchmarks.curves`.

The matched line, the geodesic of the preset, at random nodes and by the paper's plain SGD, a Bezier
curve and a polychain of one control point on both objectives, and a nudged elastic band, from the
same ends, at equal image·points: a forward and backward pass of one image through one network is
one; the ends' forward passes, which divergences need, are not counted. Each has the rate of its
three that is best, by the highest loss, on pairs of networks that are held out. All are seen at 49
points.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.convergence import PLAIN
from benchmarks.elastic import elastic_band
from benchmarks.harness import RESULTS, environment, printed, write_result
from fastgeo import Descent, Forward, Path, evaluate, keep_pages, match, optimize
from fastgeo.app.config import PRESETS
from fastgeo.app.given import Given
from fastgeo.basis import Basis
from fastgeo.figures import write_figure
from fastgeo.profiling.measure import headline
from fastgeo.train import train_ends

SEEN = 49  # points of every path that is evaluated
STACKED = Forward(engine="stacked")
RATES = (0.05, 0.1, 0.2)
FOUND = (
    "highest train loss, nats",
    "mean along its length",
    "highest test loss",
    "Fisher-Rao, rad",
)
REFERENCE = "geodesic, the preset"
LESS = "less the geodesic's"
ENDS = ("matched", "unmatched")
# Colours that differ in grey, too, and for colour-blind eyes (Okabe and Ito).
COLOURS = {
    "line": "black",
    "geodesic": "#0072b2",
    "Bezier": "#d55e00",
    "polychain": "#009e73",
    "elastic band": "#cc79a7",
}
DASHES = ("-", "--", ":")
MANY = 10_000  # steps, over which the levels of coarse to fine are averaged


@dataclass(frozen=True)
class Options:
    """Finds paths between pairs of networks by several methods, at the same cost."""

    pairs: int = 8
    """pairs of seeds (0, 1), (2, 3), ... that are compared"""
    held_out: int = 2
    """further pairs, on which each method's rate is chosen; 0: on the pairs themselves"""
    preset: str = "digits"
    """whose ends, data and path: digits, paper-small, cifar10 or paper"""
    model: str | None = None
    """mlp, say; the preset's by default"""
    budgets: tuple[float, ...] = (1.0, 4.0)
    """costs, in those of the preset's geodesic"""
    save: bool = False
    """write benchmarks/results/curves-PRESET.json, and the figure"""


@dataclass(frozen=True)
class Method:
    """How a path is found.

    Attributes:
        make: (a, b, N) -> the path to start from; None for an elastic band.
        descent: at any rate; None for none.
        rates: to choose from.
    """

    make: Callable[..., Path] | None
    descent: Descent | None = Descent()
    rates: tuple[float, ...] = RATES

    @property
    def labels(self) -> bool:
        return self.make is None or (
            self.descent is not None and self.descent.objective == "cross_entropy"
        )


LABELLED = Descent(objective="cross_entropy", nodes=1)
METHODS = {
    "line": Method(Path.linear, None, (0.0,)),
    REFERENCE: Method(Path.linear),
    "geodesic, random nodes": Method(Path.linear, Descent(nodes=3)),
    "geodesic, plain SGD": Method(Path.linear, PLAIN, (0.1, 0.2, 0.4)),
    "Bezier, JSD": Method(Path.bezier, Descent(nodes=3)),
    "Bezier, cross-entropy": Method(Path.bezier, LABELLED),
    "polychain, JSD": Method(Path.polychain, Descent(nodes=3)),
    "polychain, cross-entropy": Method(Path.polychain, LABELLED),
    "elastic band": Method(None, rates=(0.01, 0.02, 0.05)),
}


class Pair:
    """Two networks, matched and not, and the data between which paths are found.

    Attributes:
        ends: "matched" and "unmatched" -> states (a, b).
    """

    def __init__(self, options: Options, number: int):
        preset = PRESETS[options.preset]
        seeds = dict(seed_a=2 * number, seed_b=2 * number + 1)
        given = Given(preset.changed(**seeds, model=options.model or preset.ends.model))
        self.config = c = given.config
        self.dataset, self.module = given.dataset, given.new_module().to(given.device)
        train = given.new_module, self.dataset, c.ends.seeds, c.training
        a, b = train_ends(*train, progress=True, forward=STACKED)
        inputs, _ = next(iter(self.dataset.in_order("train", c.evaluation.eval_batch_size)))
        restarts = c.matching.match_restarts
        matching = match(a, b, inputs, module=self.module, restarts=restarts)
        self.ends = {"matched": (a, matching.state_dict), "unmatched": (a, b)}

    def networks(self, budget: float) -> int:
        """Passes of one network on a batch that a method may cost."""
        return round(budget * self._each(self.config.descent) * self.config.path.steps)

    def path(self, method: Method, kind: str, lr: float, budget: float) -> Path:
        """What a method finds; ValueError if it diverges."""
        torch.manual_seed(self.config.path.path_seed)  # of random nodes
        networks, points = self.networks(budget), self.config.path.points
        order = torch.Generator().manual_seed(self.config.path.path_seed)
        batches = self.dataset.shuffled(self.config.path.batch_size, order)
        if method.make is None:
            return elastic_band(*self.ends[kind], self.module, batches, lr=lr, networks=networks)
        path = method.make(*self.ends[kind], points)
        if method.descent is None:
            return path
        how = replace(method.descent, lr=lr)
        steps = round(networks / self._each(how))
        return optimize(path, self.module, batches, steps=steps, descent=how, forward=STACKED)

    def result(self, method: Method, kind: str, lr: float, budget: float) -> dict[str, Any]:
        """What is found of a path, with its training losses at `SEEN` points."""
        started = perf_counter()
        try:
            path = self.path(method, kind, lr, budget)
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            return dict.fromkeys(FOUND, math.inf) | {"seconds": math.inf, "losses": []}
        seconds, size = perf_counter() - started, self.config.evaluation.eval_batch_size
        splits = {split: self.dataset.in_order(split, size) for split in ("train", "test")}
        path = path.resample(SEEN)
        found = evaluate(path, self.module, splits, forward=STACKED)
        train, lengths = torch.tensor(found.splits["train"].loss), path.euclidean().cpu()
        mean = ((train[1:] + train[:-1]) / 2 * lengths).sum() / lengths.sum()
        test = found.splits["test"].loss
        values = (train.max().item(), mean.item(), max(test), found.fisher_rao)
        sound = [math.inf if math.isnan(value) else value for value in values]
        row = dict(zip(FOUND, sound, strict=True))
        return row | {"seconds": seconds, "losses": train.tolist()}

    def _each(self, descent: Descent) -> float:
        """Networks that a step evaluates, on average."""
        if descent.nodes is not None:
            return descent.nodes
        basis = Basis("polychain", self.config.path.points)
        first, size = zip(*descent.levels(basis, MANY).items(), strict=True)
        last = (*first[1:], MANY)
        spans = zip(first, last, size, strict=True)
        return sum((end - begin) * (points - 2) for begin, end, points in spans) / MANY


def chosen(pairs: list[Pair], method: Method, kind: str, budget: float) -> float:
    """The rate whose highest losses are lowest on average."""

    def highest(lr: float) -> float:
        return sum(pair.result(method, kind, lr, budget)[FOUND[0]] for pair in pairs)

    return min(method.rates, key=highest) if len(method.rates) > 1 else method.rates[0]


def measured(
    options: Options, pairs: list[Pair], held_out: list[Pair]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """A row for each cost, kind of ends and method, and what it is of: the results of each pair."""
    for budget, kind in itertools.product(options.budgets, ENDS):
        reference: list[dict[str, Any]] = []
        for name, method in METHODS.items():
            lr = chosen(held_out or pairs, method, kind, budget)
            results = [pair.result(method, kind, lr, budget) for pair in pairs]
            reference = results if name == REFERENCE else reference
            images = pairs[0].networks(budget) * pairs[0].config.path.batch_size
            row = {
                "image·points": f"{images:.3g}" if method.descent or not method.make else "0",
                "ends": kind,
                "path": name,
                "labels": "yes" if method.labels else "no",
                "rate": f"{lr:g}",
                **{key: spread([result[key] for result in results]) for key in FOUND},
                "seconds": f"{statistics.mean(result['seconds'] for result in results):.0f}",
                **{f"{key}: {LESS}": less(results, reference, key) for key in (FOUND[0], FOUND[3])},
            }
            yield row, [{"budget": budget, **result} for result in results]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    if math.inf in values:
        return "diverged"
    deviation = f" ± {statistics.stdev(values):.{digits - 1}g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}g}{deviation}"


def less(results: list[dict], reference: list[dict], key: str) -> str:
    """Paired differences from the reference, and on how many pairs they are below 0."""
    if not reference or results is reference:
        return "-"
    differences = [r[key] - other[key] for r, other in zip(results, reference, strict=True)]
    wins = sum(difference < 0 for difference in differences)
    return f"{spread(differences, 2)}, less on {wins} of {len(differences)}"


def figure(rows: list[dict[str, Any]], results: list[list[dict[str, Any]]]) -> Figure:
    """Between matched ends: loss along the paths of the first pair, and length against cost."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    along, lengths = drawn.subplots(1, 2)
    kinds: list[str] = []
    for name in METHODS:
        kind = name.partition(",")[0]
        dashes = DASHES[kinds.count(kind)]
        kinds.append(kind)
        look: dict[str, Any] = dict(color=COLOURS[kind], linestyle=dashes, linewidth=1.3)
        own = [
            (row, found)
            for row, found in zip(rows, results, strict=True)
            if (row["path"], row["ends"]) == (name, "matched")
        ]
        losses = own[0][1][0]["losses"]
        if losses:
            along.plot([i / (SEEN - 1) for i in range(SEEN)], losses, label=name, **look)
        costs = [float(row["image·points"]) for row, _ in own]
        means = [statistics.mean(result[FOUND[3]] for result in found) for _, found in own]
        if all(costs) and math.inf not in means:
            lengths.plot(costs, means, marker="o", markersize=3, **look)
    along.set(xlabel="position on the path", ylabel=FOUND[0].removeprefix("highest "), yscale="log")
    lengths.set(xlabel="image·points", ylabel=FOUND[3], xscale="log")
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    for axis in (along, lengths):
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.curves")
    keep_pages()
    print(headline(environment()), flush=True)
    every = [Pair(options, number) for number in range(options.pairs + options.held_out)]
    pairs, held_out = every[: options.pairs], every[options.pairs :]
    results = []

    def rows() -> Iterator[list[dict[str, Any]]]:
        for row, found in measured(options, pairs, held_out):
            results.append(found)
            yield [row]

    table = printed(rows())
    if options.save:
        name = f"curves-{options.preset}" + (f"-{options.model}" if options.model else "")
        write_figure(RESULTS / f"{name}.png", figure(table, results))
        kept = [{**row, "pairs": found} for row, found in zip(table, results, strict=True)]
        print(f"\nwrote {write_result(name, {'rows': kept})}")


if __name__ == "__main__":
    main()
