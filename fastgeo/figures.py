"""Figures and tables of evaluated paths, and what everything is called in them.

A path comes as `Evaluation.to_json` gives it, and as report.json holds it. Matplotlib is imported
when a figure is drawn. Colours differ in lightness, too, and lines by markers or dashes, so that
all can be told apart in grey and without red and green; widths are those of a paper's column.
"""

import html
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fastgeo.store.files import read_json, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPTIMISED = {"geodesic": "geodesic", "bezier": "Bezier curve", "polychain": "polychain"}
PATHS = {"linear": "line", "matched": "matched line"} | OPTIMISED
COMPARED = {"linear": "line", "matched": "matched line", "optimised": "optimised path"}
SPLITS = {"train": "train", "augmented_train": "augmented train", "test": "test"}
LENGTHS = {  # name in an evaluation -> what it is called, and its unit
    "energy": ("energy Σ JSD", "nats"),
    "sqrt_jsd": ("Σ√JSD", "√nats"),
    "fisher_rao": ("Fisher-Rao", "rad"),
    "euclidean": ("Σ‖Δθ‖", ""),
}
MEASURES: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
    # What it is called in a table of paths, its unit, and its cell for a split. The mean, which
    # older reports lack, is along arc length.
    ("highest loss", "nats", lambda split: f"{max(split['loss']):.3f}"),
    ("mean loss", "nats", lambda split: f"{split['mean']:.3f}" if "mean" in split else ""),
    ("barrier", "nats", lambda split: f"{split['barrier']:.3f}"),
    ("lowest acc.", "%", lambda split: f"{100 * min(split['accuracy']):.1f}"),
)
COLUMN = 3.4  # inches, the width of a column of a paper
CONTOURS = 14  # bands of a plane's loss
MARKERS = 25  # on a line, about
FONT = 8  # points
LINE: dict[str, Any] = {"linewidth": 1.1, "markersize": 2.8, "markeredgewidth": 0.8}
INSERTED: dict[str, Any] = {"color": "0.4", "linestyle": ":", "linewidth": 0.8}
Paths = Mapping[str, Mapping[str, Any]]


class Style(NamedTuple):
    colour: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


PALETTE = (  # of Okabe and Ito, "Color Universal Design" (2008), and grey
    Style("#0072B2", "o", "-"),
    Style("#D55E00", "^", "--"),
    Style("#A0A0A0", "s", "-."),
    Style("#009E73", "D", ":"),
    Style("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    Style("#CC79A7", "P", (0, (8, 2))),
    Style("#56B4E9", "X", (0, (1, 3))),
)
KNOWN = dict.fromkeys(OPTIMISED, PALETTE[0]) | {"matched": PALETTE[1], "linear": PALETTE[2]}
SPLIT_DASHES = {"train": "-", "test": "--", "augmented_train": ":"}


def styles(names: Iterable[str]) -> dict[str, Style]:
    """A style for each of several lines; the paths of a run always have the same."""
    names = list(names)
    known: dict[str, Style] = {}
    for name in names:
        if name in KNOWN and KNOWN[name] not in known.values():
            known[name] = KNOWN[name]
    free = [style for style in PALETTE if style not in known.values()] or list(PALETTE)
    others = [name for name in names if name not in known]
    return {
        name: known[name] if name in known else free[others.index(name) % len(free)]
        for name in names
    }


def optimised(paths: Iterable[str]) -> str:
    """The name of the path of a run that is neither of its lines."""
    return next(name for name in paths if name in OPTIMISED)


def splits_of(path: Mapping[str, Any]) -> list[str]:
    """The names of the splits of an evaluated path."""
    return [name for name, value in path.items() if isinstance(value, Mapping)]


def along(
    paths: Paths,
    *,
    splits: Sequence[str] | None = None,
    title: str = "",
    published: Mapping[str, Mapping[str, Sequence[float | None]]] | None = None,
    unit: str = "nats",
) -> "Figure":
    """Loss along paths, on a linear and on a logarithmic axis, and accuracy.

    Args:
        paths: name -> what `Evaluation.to_json` gives.
        splits: those to draw; all of the first path by default.
        title: above the figure.
        published: path -> split -> [N] losses in nats that somebody else found, drawn as crosses;
            None where there is none.
        unit: of the losses.
    """
    from matplotlib.ticker import PercentFormatter

    splits = splits_of(next(iter(paths.values()))) if splits is None else splits
    style = styles(paths)
    dashes = dict(zip(splits, ("-", "--", ":", "-."), strict=False)) | SPLIT_DASHES
    figure, panels = _panels((2, 2, 1.3), title)
    for name, path in paths.items():
        colour, marker, _ = style[name]
        for i, split in enumerate(splits):
            how: dict[str, Any] = dict(color=colour, marker=marker, linestyle=dashes[split])
            how |= dict(markerfacecolor="white" if i else colour, label=_called(name, split))
            for axes, key in zip(panels, ("loss", "loss", "accuracy"), strict=True):
                values = path[split][key]
                axes.plot(_positions(values), values, markevery=_every(values), **LINE, **how)
    for name, own in (published or {}).items():
        for split, losses in own.items():
            points = zip(_positions(losses), losses, strict=True)
            places = [(t, loss) for t, loss in points if loss is not None]
            how = dict(marker="x" if split == "test" else "+", color=style[name].colour)
            for axes in panels[:2]:
                x, y = zip(*places, strict=True)
                label = f"published: {_called(name, split)}"
                axes.scatter(x, y, 14, label=label, linewidths=0.7, **how)
    linear, logarithmic, accuracy = panels
    linear.set(ylabel=f"cross-entropy ({unit})", ylim=(0, None))
    if any(max(path[split]["loss"]) > 0 for path in paths.values() for split in splits):
        logarithmic.set(ylabel="the same, log scale", yscale="log")
    accuracy.set(ylabel="accuracy", xlabel="position on the path, from end a to end b", xlim=(0, 1))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    lines: list[dict[str, Any]] = [
        dict(color=own.colour, marker=own.marker, label=PATHS.get(name, name))
        for name, own in style.items()
    ]
    strokes: list[dict[str, Any]] = [
        dict(color="0.2", linestyle=dashes[split], label=SPLITS.get(split, split))
        for split in splits
    ]
    if published:
        strokes.append(dict(color="0.2", marker="x", linestyle="", label="published"))
    _legend(figure, *(group for group in (lines, strokes) if len(group) > 1))
    return figure


def _called(path: str, split: str) -> str:
    return f"{PATHS.get(path, path)}, {SPLITS.get(split, split)}"


def _legend(figure: "Figure", *groups: Sequence[dict[str, Any]]) -> None:
    """Above the panels, where it covers nothing; each group begins a row."""
    from matplotlib.lines import Line2D

    columns = min(3, max(map(len, groups), default=0))
    nothing: dict[str, Any] = dict(linestyle="", label=" ")
    rows = [group[i : i + 3] for group in groups for i in range(0, len(group), 3)]
    cells = [
        row[column] if column < len(row) else nothing for column in range(columns) for row in rows
    ]
    if cells:
        options: dict[str, Any] = dict(ncols=columns, frameon=False, fontsize=FONT)
        handles = [Line2D([], [], **LINE | cell) for cell in cells]
        figure.legend(handles=handles, loc="outside upper center", **options)


def lengths(history: Sequence[Mapping[str, Any]], *, title: str = "") -> "Figure":
    """Lengths of a path during its optimisation; dotted lines are where points were inserted.

    Args:
        history: a mapping for each step, as `fastgeo.optimize` gives to on_step and as
            metrics.jsonl holds them: "step", "sqrt_jsd" or "cross_entropy", "euclidean" and, if
            points were inserted on the way, "points".
        title: above the figure.
    """
    from matplotlib.ticker import MaxNLocator

    figure, panels = _panels((1.6, 1), title)
    upper, lower = panels
    steps = [line["step"] for line in history]
    objective = "sqrt_jsd" if "sqrt_jsd" in history[0] else "cross_entropy"
    for axes, key, style in zip(panels, (objective, "euclidean"), PALETTE, strict=False):
        measured = [line for line in history if key in line]
        values = [line[key] for line in measured]
        axes.plot([line["step"] for line in measured], values, color=style.colour, **LINE)
        axes.set_ylim(0, 1.1 * max(values))
    names = {"sqrt_jsd": "Σ√JSD of a batch (√nats)", "cross_entropy": "loss on a batch (nats)"}
    upper.set_ylabel(names[objective])
    lower.set(ylabel="Σ‖Δθ‖", xlabel="optimisation step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    points = [line.get("points") for line in history]
    for before, after, step in zip(points, points[1:], steps[1:], strict=False):
        if before != after:
            for axes in panels:
                axes.axvline(step - 0.5, **INSERTED)
            place = lower.get_xaxis_transform()
            lower.annotate(
                f"N = {after}", (step - 0.3, 0.06), xycoords=place, rotation=90, fontsize=FONT - 1
            )
    return figure


def plane(found: Mapping[str, Any], *, title: str = "") -> "Figure":
    """Contours of the loss over a plane, with a path on it, and the loss along the path beneath.

    The path's points are coloured by their distance from the plane: below one that is far from it,
    the plane's loss is not the path's. The two axes have scales of their own, since a path bends
    little beside its length.

    Args:
        found: what `Plane.to_json` gives.
        title: above the figure.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    figure, (over, beneath) = _panels((2.6, 1.2), title, sharex=False)
    low, high = _bounds([loss for row in found["loss"] for loss in row])
    levels = [low * (high / low) ** (i / CONTOURS) for i in range(CONTOURS + 1)]
    clipped = [[min(max(loss, low), high) for loss in row] for row in found["loss"]]
    scale = LogNorm(low, high)
    over.contourf(found["x"], found["y"], clipped, levels, norm=scale, cmap="Greys")
    _bar(figure, ScalarMappable(scale, "Greys"), over, "cross-entropy (nats)")
    a, b, c = found["corners"]
    over.plot(*zip(a, b, strict=True), color="0.2", linestyle="--", **LINE)
    dots: dict[str, Any] = dict(c=found["distance"], cmap="viridis", s=9, zorder=3)
    dots["norm"] = Normalize(0, max([*found["distance"], 1e-3 * b[0]]))
    over.plot(*zip(*found["path"], strict=True), color="white", **LINE)
    over.scatter(*zip(*found["path"], strict=True), **dots)
    for name, place, height in zip("abc", (a, b, c), (-10, -10, 5), strict=True):
        how: dict[str, Any] = dict(textcoords="offset points", ha="center", fontsize=FONT)
        over.annotate(name, place, (0, height), **how)
    over.set(xlabel="along the line from a to b", ylabel="across it")
    over.grid(False)
    losses = found["path_loss"]
    beneath.plot(_positions(losses), losses, color="0.6", **LINE)
    shown = beneath.scatter(_positions(losses), losses, **dots)
    _bar(figure, shown, beneath, "off the plane")
    beneath.set(xlabel="position on the path, from a to b", ylabel="its own loss (nats)")
    beneath.set(xlim=(0, 1), ylim=(0, None))
    return figure


def _bar(figure: "Figure", shown: Any, axes: "Axes", label: str) -> None:
    """What the colours mean."""
    bar = figure.colorbar(shown, ax=axes)
    bar.set_label(label, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)


def _bounds(losses: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest positive loss that is finite, somewhat apart."""
    sound = [loss for loss in losses if 0 < loss < float("inf")] or [1.0]
    return min(sound), max(max(sound), 1.01 * min(sound))


def write_figure(file: FilePath, figure: "Figure", *, dpi: int = 300) -> None:
    """A figure in the format that the file's suffix names: .png, .pdf or .svg."""
    write_bytes(file, _drawn(figure, file.suffix.removeprefix("."), dpi))


def _drawn(figure: "Figure", form: str, dpi: float) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, dpi=dpi, format=form)
    return content.getvalue()


def _panels(
    heights: Sequence[float], title: str, *, sharex: bool = True
) -> tuple["Figure", list["Axes"]]:
    """Panels of a column's width, one above the other, over the same horizontal axis or not."""
    import matplotlib
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A notebook shows other figures only where pyplot was imported."""

        def _repr_png_(self) -> bytes:
            return _drawn(self, "png", self.dpi)

    with matplotlib.rc_context({"font.size": FONT, "axes.titlesize": FONT}):
        height = 0.5 + sum(heights)
        figure = Shown(figsize=(COLUMN, height), layout="constrained", dpi=150)
        panels = list(figure.subplots(len(heights), sharex=sharex, height_ratios=heights))
        for axes in panels:
            axes.grid(alpha=0.3)
        if title:
            panels[0].set_title(title)
    return figure, panels


def _positions(values: Sequence[Any]) -> list[float]:
    """Point i of N is at i / (N - 1)."""
    return [i / (len(values) - 1) for i in range(len(values))]


def _every(values: Sequence[Any]) -> int:
    return -(-len(values) // MARKERS)


@dataclass(frozen=True)
class Table:
    """Cells of text, shown by `print` as text, in a notebook as a table, and as `markdown()`.

    Attributes:
        titles: what is in each column, with its unit.
        head: the same in some lines, where a title goes on in the columns beside it.
        rows: the cells.
    """

    titles: list[str]
    head: list[list[str]]
    rows: list[list[str]]

    def __str__(self) -> str:
        rows = [*self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        )
        return "\n".join(line.rstrip() for line in lines)

    __repr__ = __str__

    def markdown(self) -> str:
        return markdown_table([self.titles, *self.rows])

    def _repr_html_(self) -> str:
        rows = [("th", self.titles), *(("td", row) for row in self.rows)]
        lines = (
            "<tr>" + "".join(f"<{kind}>{html.escape(cell)}</{kind}>" for cell in cells) + "</tr>"
            for kind, cells in rows
        )
        return f"<table>{''.join(lines)}</table>"


def markdown_table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells, the first of which are the titles, as Markdown."""
    head, *body = rows
    numbers = [all(cell[:1] in "-.0123456789" for cell in own) for own in zip(*body, strict=True)]
    rule = ["---:" if number and i else "---" for i, number in enumerate(numbers)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def table(paths: Paths, *, splits: Sequence[str] | None = None) -> Table:
    """A row for each path: the highest loss, the mean along its arc length, the barrier and the
    lowest accuracy on each split, and the lengths. The barrier is the highest loss less the mean of
    the two ends.

    Args:
        paths, splits: as in `along`.
    """
    splits = splits_of(next(iter(paths.values()))) if splits is None else splits
    columns = [("path", "", "", "path")]  # three lines, and the title
    for measure, unit, _ in MEASURES:
        words = measure.split() if len(splits) > 1 else [measure]
        for i, split in enumerate(SPLITS.get(split, split) for split in splits):
            above = words[i] if i < len(words) else ""
            columns.append((above, split, unit, f"{measure}, {split}, {unit}"))
    for key in ("sqrt_jsd", "fisher_rao", "euclidean"):
        name, unit = LENGTHS[key]
        columns.append((name, "", unit, f"{name}, {unit}" if unit else name))
    rows = []
    for name, path in paths.items():
        rows.append(
            [
                PATHS.get(name, name),
                *(cell(path[split]) for _, _, cell in MEASURES for split in splits),
                f"{path['sqrt_jsd']:.3f}",
                f"{path['fisher_rao']:.3f}",
                f"{path['euclidean']:.2f}",
            ]
        )
    *head, titles = map(list, zip(*columns, strict=True))
    return Table(titles, head, rows)


def summary(path: Mapping[str, Any]) -> Table:
    """One path: a column for each split; the lengths are those on the first one."""
    splits = splits_of(path)
    own = [path[split] for split in splits]
    rows = [
        ["highest loss, nats", *(f"{max(split['loss']):.3f}" for split in own)],
        ["mean loss along arc length, nats", *(f"{split['mean']:.3f}" for split in own)],
        ["loss integrated along arc length, nats", *(f"{split['integral']:.3f}" for split in own)],
        ["barrier over the mean of the ends, nats", *(f"{split['barrier']:.3f}" for split in own)],
        ["barrier above the line, nats", *(f"{split['barrier_above_line']:.3f}" for split in own)],
        ["lowest accuracy, %", *(f"{100 * min(split['accuracy']):.1f}" for split in own)],
    ]
    others = [""] * (len(splits) - 1)
    for key, (name, unit) in LENGTHS.items():
        title = f"{name}, {unit}" if unit else name
        rows.append([title, f"{path[key]:.4f}", *others])
        if key == "fisher_rao":
            bound = path["fisher_rao_lower_bound"]
            rows.append([f"lowest possible {title}", f"{bound:.4f}", *others])
    titles = ["", *(SPLITS.get(split, split) for split in splits)]
    return Table(titles, [titles], rows)


class Evaluated(Protocol):
    """What `fastgeo.evaluate` returns."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns.

    Attributes:
        paths: name -> the path as `Evaluation.to_json` gives it.
    """

    paths: dict[str, Mapping[str, Any]]

    def table(self) -> Table:
        """A row for each path."""
        return table(self.paths, splits=self._splits())

    def plot(self, *, title: str = "") -> "Figure":
        """All paths in one figure."""
        return along(self.paths, splits=self._splits(), title=title)

    def _splits(self) -> list[str]:
        """Those that all of them have."""
        first, *others = map(splits_of, self.paths.values())
        return [name for name in first if all(name in other for other in others)]

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def compare(
    runs: Mapping[str, Evaluated | str | os.PathLike] | Sequence[str | os.PathLike],
    *,
    path: str = "optimised",
) -> Comparison:
    """Several paths beside each other: `print` shows a table, `plot()` draws them in one figure.

    Args:
        runs: name -> an evaluation or the folder of a run; or folders alone, named as they are.
        path: which path of a run, "linear", "matched" or "optimised", be that one a geodesic or a
            curve.

    Raises:
        ValueError: nothing to compare, a folder without a report, an unknown path, or paths without
            a split in common.

    Example:
        >>> print(compare({"line": evaluate(line, net, data), "mine": evaluate(path, net, data)}))
        >>> compare(["runs/first", "runs/second"]).plot().savefig("both.png")
    """
    if path not in COMPARED:
        raise ValueError(f"path must be one of {', '.join(COMPARED)}, got {path!r}")
    if not isinstance(runs, Mapping):
        runs = {os.fspath(run): run for run in runs}
    paths: dict[str, Mapping[str, Any]] = {}
    for name, run in runs.items():
        if isinstance(run, str | os.PathLike):
            found = read_json(FilePath(run) / "report.json")["paths"]
            paths[name] = found[optimised(found) if path == "optimised" else path]
        else:
            paths[name] = run.to_json()
    if not paths:
        raise ValueError("name at least one run folder or evaluation to compare")
    both = Comparison(paths)
    if not both._splits():
        inside = "; ".join(f"{name}: {', '.join(splits_of(own))}" for name, own in paths.items())
        raise ValueError(f"the paths have no split in common ({inside})")
    return both
