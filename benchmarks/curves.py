"""Geodesics beside curve finding: `python -m benchmarks.curves`.

The matched line, the geodesic of free points at the preset's own nodes, at random ones and by the
paper's plain SGD, a Bezier curve and a polychain of one control point on both objectives, and a
nudged elastic band, from the same ends, at equal image·points: a forward and backward pass of one
image through one network is one; the ends' forward passes, which divergences need, are not counted.
Each has its best rate, by the highest loss, on the matched ends of pairs that are held out, at the
first of the budgets: rates are halved or doubled until the best is between two others. All paths
are seen at their points and the middles between.

Every result is a line in a file, from which a benchmark that was stopped goes on.
"""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from time import process_time
from typing import Any, Literal, NamedTuple

import torch
import tyro
from matplotlib.figure import Figure

from benchmarks.convergence import PLAIN
from benchmarks.elastic import elastic_band
from benchmarks.ends import trained
from benchmarks.harness import RESULTS, Kept, environment, write_result
from fastgeo import Descent, Forward, Path, evaluate, keep_pages, optimize
from fastgeo.app.config import PRESETS, Config
from fastgeo.app.given import Given
from fastgeo.basis import Basis
from fastgeo.figures import PALETTE, write_figure
from fastgeo.profiling.measure import headline, table

FOUND = (
    "highest train loss, nats",
    "mean along its length",
    "highest test loss",
    "Fisher-Rao, rad",
)
SECONDS = "processor seconds"
REFERENCE = "geodesic, own nodes"
LESS = "less the geodesic's"
COLOURS = {
    "line": "black",
    "geodesic": PALETTE[0].colour,
    "Bezier": PALETTE[1].colour,
    "polychain": PALETTE[3].colour,
    "elastic band": PALETTE[5].colour,
}
DASHES = ("-", "--", ":")
TEST_IMAGES = 512  # at most
MANY = 10_000  # steps, over which the levels of coarse to fine are averaged


@dataclass(frozen=True)
class Method:
    """How a path is found.

    Attributes:
        make: (a, b, N) -> the path to start from; None for an elastic band.
        descent: at any rate; None for none.
        rate: the first that is tried.
    """

    make: Callable[..., Path] | None
    descent: Descent | None = Descent()
    rate: float = 0.1

    @property
    def labels(self) -> bool:
        return self.make is None or (
            self.descent is not None and self.descent.objective == "cross_entropy"
        )


LABELLED = Descent(objective="cross_entropy", nodes=1)
METHODS = {
    "line": Method(Path.linear, None),
    REFERENCE: Method(Path.linear),
    "geodesic, random nodes": Method(Path.linear, Descent(nodes=3)),
    "geodesic, plain SGD": Method(Path.linear, PLAIN, 0.2),
    "Bezier, JSD": Method(Path.bezier, Descent(nodes=3)),
    "Bezier, cross-entropy": Method(Path.bezier, LABELLED),
    "polychain, JSD": Method(Path.polychain, Descent(nodes=3)),
    "polychain, cross-entropy": Method(Path.polychain, LABELLED),
    "elastic band": Method(None, rate=0.02),
}
Kind = Literal["matched", "unmatched"]


@dataclass(frozen=True)
class Options:
    """Finds paths between pairs of networks by several methods, at the same cost."""

    pairs: int = 8
    """pairs of seeds (0, 1), (2, 3), ... that are compared"""
    held_out: int = 2
    """further pairs, on which each method's rate is chosen; 0: on the pairs themselves"""
    preset: str = "digits"
    """whose ends, data and path: digits, paper-small, cifar10 or paper"""
    data: str | None = None
    """as of `fastgeo run`; the preset's by default"""
    model: str | None = None
    """mlp, say; the preset's by default"""
    budgets: tuple[float, ...] = (1.0, 4.0)
    """costs, in those of the preset's geodesic"""
    ends: tuple[Kind, ...] = ("matched", "unmatched")
    methods: tuple[str, ...] = tuple(METHODS)
    engine: Literal["stacked", "loop"] = "stacked"
    """what evaluates the networks; the loop in channels-last"""
    out: FilePath | None = None
    """file of all results, with the networks beside it; by default runs/curves-PRESET.jsonl"""
    measure: bool = True
    """no: only the table of the results there are"""
    save: bool = False
    """write benchmarks/results/curves-PRESET.json, and the figure"""

    @property
    def name(self) -> str:
        return f"curves-{self.preset}" + (f"-{self.model}" if self.model else "")

    @property
    def config(self) -> Config:
        preset = PRESETS[self.preset]
        return preset.changed(
            model=self.model or preset.ends.model, data=self.data or preset.data.data
        )

    @property
    def forward(self) -> Forward:
        return Forward(engine=self.engine, channels_last=self.engine == "loop" or None)


class Case(NamedTuple):
    """What a result is of; the budget of a line is 0."""

    pair: int
    ends: str
    method: str
    rate: float
    budget: float


class Pair:
    """Two networks, matched and not, and the data between which paths are found.

    Attributes:
        ends: "matched" and "unmatched" -> states (a, b).
    """

    def __init__(self, options: Options, number: int, kept: FilePath | None = None):
        given = Given(options.config.changed(seed_a=2 * number, seed_b=2 * number + 1))
        self.config, self.forward = given.config, options.forward
        self.dataset, self.module = given.dataset, given.new_module().to(given.device)
        if kept is not None and kept.exists():
            self.ends = torch.load(kept, map_location=given.device)
        else:
            a, b, matched = trained(given, self.forward)
            self.ends = {"matched": (a, matched), "unmatched": (a, b)}
            if kept is not None:
                torch.save(self.ends, kept)

    def path(self, case: Case) -> Path:
        """What a method finds; ValueError if it diverges."""
        method, settings = METHODS[case.method], self.config.path
        torch.manual_seed(settings.path_seed)  # of random nodes
        order = torch.Generator().manual_seed(settings.path_seed)
        batches = self.dataset.shuffled(settings.batch_size, order)
        ends, cost = self.ends[case.ends], networks(self.config, case.budget)
        if method.make is None:
            return elastic_band(*ends, self.module, batches, lr=case.rate, networks=cost)
        path = method.make(*ends, settings.points)
        if method.descent is None:
            return path
        how = replace(method.descent, lr=case.rate)
        steps = round(cost / in_a_step(how, settings.points))
        return optimize(path, self.module, batches, steps=steps, descent=how, forward=self.forward)

    def result(self, case: Case) -> dict[str, Any]:
        """What is found of a path, with its training losses along it."""
        started = process_time()
        try:
            path = self.path(case)
        except ValueError as error:
            if "lower lr" not in str(error):
                raise
            return dict.fromkeys((*FOUND, SECONDS), math.inf) | {"losses": []}
        seconds = process_time() - started
        path = path.resample(2 * self.config.path.points - 1)
        size = self.config.evaluation.eval_batch_size
        test = itertools.islice(self.dataset.in_order("test", size), max(1, TEST_IMAGES // size))
        splits = {"train": self.dataset.in_order("train", size), "test": list(test)}
        found = evaluate(path, self.module, splits, forward=self.forward)
        train, test_loss = found.splits["train"], max(found.splits["test"].loss)
        values = (max(train.loss), train.mean, test_loss, found.fisher_rao, seconds)
        sound = [math.inf if math.isnan(value) else float(f"{value:.5g}") for value in values]
        row = dict(zip((*FOUND, SECONDS), sound, strict=True))
        return row | {"losses": [float(f"{loss:.4g}") for loss in train.loss]}


def networks(config: Config, budget: float) -> int:
    """Passes of one network on a batch that a method may cost."""
    return round(budget * in_a_step(config.descent, config.path.points) * config.path.steps)


def in_a_step(descent: Descent, points: int) -> float:
    """Networks that a step evaluates, on average."""
    if descent.nodes is not None:
        return descent.nodes
    first, size = zip(*descent.levels(Basis("polychain", points), MANY).items(), strict=True)
    spans = zip(first, (*first[1:], MANY), size, strict=True)
    return sum((end - begin) * (points - 2) for begin, end, points in spans) / MANY


class Results:
    """What was found in each case, kept in a file as soon as it is.

    Raises:
        ValueError: the file is of other networks or data.
    """

    def __init__(self, options: Options):
        self.options = options
        self.file = options.out or FilePath("runs") / f"{options.name}.jsonl"
        self.known: dict[Case, dict[str, Any]] = {}
        self._pairs: dict[int, Pair] = {}
        own = {"preset": options.preset, "model": options.model, "data": options.data}
        self._kept = Kept(self.file, own)
        for line in self._kept.lines:
            self.known[Case(*(line.pop(name) for name in Case._fields))] = line

    def measure(self) -> None:
        """All that is not known yet, pair by pair, so that methods can be compared at any time."""
        o = self.options
        for name in o.methods:
            while cases := self.search(name)[0]:
                for case in cases:
                    self._measure(case)
        for budget, ends, pair, name in itertools.product(
            o.budgets, o.ends, range(o.pairs), o.methods
        ):
            case = self.best(pair, ends, name, budget)
            if case is not None and case not in self.known:
                self._measure(case)

    def search(self, name: str) -> tuple[list[Case], float]:
        """What to try before the rate of a method is known, and the best rate until then."""
        o, rate = self.options, METHODS[name].rate
        if METHODS[name].descent is None:
            return [], 0.0
        pairs = range(o.pairs, o.pairs + o.held_out) if o.held_out else range(o.pairs)
        rates = [rate / 2, rate]
        while True:
            tried = [
                [Case(pair, "matched", name, r, o.budgets[0]) for pair in pairs] for r in rates
            ]
            if unknown := [case for own in tried for case in own if case not in self.known]:
                return unknown, rate
            losses = [sum(self.known[case][FOUND[0]] for case in own) for own in tried]
            best = losses.index(min(losses))
            rate = rates[best]
            if best == 0:
                rates.insert(0, rate / 2)
            elif best == len(rates) - 1:
                rates.append(2 * rate)
            else:
                return [], rate

    def best(self, pair: int, ends: str, name: str, budget: float) -> Case | None:
        """At the best rate of all; None until that is known."""
        unknown, rate = self.search(name)
        moves = METHODS[name].descent is not None
        return None if unknown else Case(pair, ends, name, rate, budget if moves else 0.0)

    def rows(self) -> list[dict[str, Any]]:
        """One for each kind of ends, cost and method, as far as it is known."""
        o, rows = self.options, []
        for ends, budget in itertools.product(o.ends, o.budgets):
            reference = self._of(ends, REFERENCE, budget)
            for name in o.methods:
                own = self._of(ends, name, budget)
                case = self.best(0, ends, name, budget)
                if not own or case is None or (case.budget == 0 and budget != o.budgets[0]):
                    continue
                images = networks(o.config, case.budget) * o.config.path.batch_size
                row = {
                    "image·points": f"{images:.3g}",
                    "ends": ends,
                    "path": name,
                    "labels": "yes" if METHODS[name].labels else "no",
                    "rate": f"{case.rate:g}",
                    "pairs": len(own),
                    **{key: spread([r[key] for r in own.values()]) for key in FOUND},
                    **{f"{k}: {LESS}": less(own, reference, k) for k in (FOUND[0], FOUND[3])},
                    SECONDS: f"{statistics.mean(r[SECONDS] for r in own.values()):.1f}",
                }
                rows.append(row | {"of each": [{"pair": pair, **own[pair]} for pair in own]})
        return rows

    def _of(self, ends: str, name: str, budget: float) -> dict[int, dict[str, Any]]:
        """Pair -> what is known of it."""
        cases = (self.best(pair, ends, name, budget) for pair in range(self.options.pairs))
        return {case.pair: self.known[case] for case in cases if case in self.known}

    def _pair(self, number: int) -> Pair:
        if number not in self._pairs:
            kept = self.file.with_name(f"{self.file.stem}-{number}.pt")
            self._pairs[number] = Pair(self.options, number, kept)
        return self._pairs[number]

    def _measure(self, case: Case) -> None:
        found = self.known[case] = self._pair(case.pair).result(case)
        self._kept.add(case._asdict() | found)
        print(*case, *(f"{found[name]:.4g}" for name in FOUND), flush=True)


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    deviation = f" ± {statistics.stdev(values):.{digits - 1}g}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}g}{deviation}"


def less(own: dict[int, dict], reference: dict[int, dict], key: str) -> str:
    """Differences from the reference on the same pairs, and on how many they are below 0."""
    differences = [own[pair][key] - reference[pair][key] for pair in own if pair in reference]
    if own == reference or not differences:
        return "-"
    wins = sum(difference < 0 for difference in differences)
    return f"{spread(differences, 2)}, less on {wins} of {len(differences)}"


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Between matched ends: loss along the paths of the first pair, and length against cost."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    along, lengths = drawn.subplots(1, 2)
    kinds: list[str] = []
    for name in METHODS:
        kind = name.partition(",")[0]
        dashes = DASHES[kinds.count(kind)]
        kinds.append(kind)
        look: dict[str, Any] = dict(color=COLOURS[kind], linestyle=dashes, linewidth=1.3)
        own = [row for row in rows if (row["path"], row["ends"]) == (name, "matched")]
        if own and (losses := own[0]["of each"][0]["losses"]):
            along.plot(torch.linspace(0, 1, len(losses)), losses, label=name, **look)
        costs = sorted(
            (float(row["image·points"]), statistics.mean(r[FOUND[3]] for r in row["of each"]))
            for row in own
        )
        if METHODS[name].descent and all(math.isfinite(length) for _, length in costs):
            lengths.plot(*zip(*costs, strict=True), marker="o", markersize=3, **look)
    along.set(xlabel="position on the path", ylabel=FOUND[0].removeprefix("highest "), yscale="log")
    lengths.set(xlabel="image·points", ylabel=FOUND[3], xscale="log", yscale="log")
    every = {row["image·points"] for row in rows} - {"0"}
    lengths.set_xticks([], minor=True)
    lengths.set_xticks(list(map(float, every)), list(every))
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    for axis in (along, lengths):
        axis.spines[["top", "right"]].set_visible(False)
    return drawn


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.curves")
    keep_pages()
    print(headline(environment()), flush=True)
    results = Results(options)
    if options.measure:
        results.measure()
    rows = results.rows()
    print(table([{k: v for k, v in row.items() if k != "of each"} for row in rows]))
    if options.save:
        write_figure(RESULTS / f"{options.name}.png", figure(rows))
        for row in rows:
            for other in row["of each"][1:]:
                del other["losses"]  # which the figure does not show
        setting = f"{options.config.ends.model} on {options.preset}"
        print(f"\nwrote {write_result(options.name, {'setting': setting, 'rows': rows})}")


if __name__ == "__main__":
    main()
