"""The two halves of the paper's Figure 2."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path as FilePath

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"linear": "0.6", "matched": "tab:orange", "geodesic": "tab:blue"}
LABELS = {
    "linear": "line without matching",
    "matched": "line after matching",
    "geodesic": "geodesic",
}


def loss_figure(report: Mapping) -> Figure:
    """Loss along the three paths, train solid and test dashed (Figure 2, right).

    A run of the paper's network on CIFAR-10 with as many points has the paper's values as markers.
    """
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, path in report["paths"].items():
        for split, style in (("train", "-"), ("test", "--")):
            loss = path[split]["loss"]
            position = [i / (len(loss) - 1) for i in range(len(loss))]
            label = f"{LABELS[name]}, {split}"
            axes.plot(position, loss, style, color=COLOURS[name], label=label, marker=".", ms=4)
    if _is_of_the_paper(report["config"]):
        _mark_papers_values(axes)
    axes.set(
        xlabel="position on the path, i / (N − 1) (0: end a, 1: end b)",
        ylabel="cross-entropy (nats)",
        xlim=(0, 1),
        ylim=(0, None),
        title=_title(report),
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return figure


def _is_of_the_paper(config: Mapping) -> bool:
    network = (config["model"], config["width"], config["norm"]) == ("resnet20", 4, "group")
    return network and config["points"] == 25 and "cifar10" in FilePath(config["data"]).name


def _mark_papers_values(axes: Axes) -> None:
    text = (resources.files("fastgeo.app") / "paper_figure2.json").read_text()
    for name, values in json.loads(text).items():
        if name == "source":
            continue
        for split, marker in (("augmented_train", "+"), ("test", "x")):
            points = [(i / 24, loss) for i, loss in enumerate(values[split]) if loss is not None]
            style = dict(marker=marker, s=24, color=COLOURS[name], alpha=0.45)
            label = f"paper: {LABELS[name]}, {split.replace('_', ' ')}"
            axes.scatter(*zip(*points, strict=True), label=label, **style)


def length_figure(metrics: Sequence[Mapping], report: Mapping) -> Figure:
    """Lengths of the path during optimisation (Figure 2, left)."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    step = [line["step"] for line in metrics]
    curves = [
        (left, "sqrt_jsd", "-", "tab:blue", "Σ√JSD of a batch (√nats)"),
        (right, "euclidean", "--", "tab:green", "Σ‖Δθ‖ in parameter space"),
    ]
    lines = []
    for axes, key, style, colour, label in curves:
        lines += axes.plot(step, [line[key] for line in metrics], style, color=colour, label=label)
        axes.set_ylabel(label, color=colour)
        axes.tick_params(axis="y", labelcolor=colour)
    left.set(xlabel="optimisation step", ylim=(0, None), title=_title(report))
    left.grid(alpha=0.3)
    left.legend(handles=lines, frameon=False, loc="center right")
    return figure


def _title(report: Mapping) -> str:
    c = report["config"]
    data = FilePath(c["data"]).name  # of an npz, the file only
    return f"{c['model']}, width {c['width']:g}, on {data}; N = {c['points']}"
