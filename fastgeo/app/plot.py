"""The figures of a report: what is in them, and what they are called."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

from fastgeo import figures
from fastgeo.app.report import each, network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_figure(report: Mapping, title: str | None = None) -> "Figure":
    """Loss and accuracy along the three paths (Tan et al., Figure 2, right).

    A run of the paper's network on CIFAR-10 with as many points has the paper's values as crosses.

    Args:
        title: above the figure; None for what was run.
    """
    return figures.along(
        report["paths"],
        splits=("train", "test"),
        title=_title(report) if title is None else title,
        published=_papers_values() if _is_of_the_paper(report["config"]) else None,
        unit=f"nats{each(report['config'])}",
    )


def length_figure(
    metrics: Sequence[Mapping], report: Mapping, title: str | None = None
) -> "Figure":
    """Lengths of the path during optimisation (Tan et al., Figure 2, left); title as above."""
    return figures.lengths(metrics, title=_title(report) if title is None else title)


def plane_figure(found: Mapping, report: Mapping, title: str | None = None) -> "Figure":
    """What plane.json holds, drawn; title as above, with the split."""
    default = f"{_title(report)}, {figures.SPLITS[found['split']]}"
    return figures.plane(found, title=default if title is None else title)


def _is_of_the_paper(config: Mapping) -> bool:
    papers = (config["model"], config["width"], config["norm"]) == ("resnet20", 4, "group")
    return papers and config["points"] == 25 and "cifar10" in FilePath(config["data"]).name


def _papers_values() -> dict[str, dict[str, list[float | None]]]:
    text = (resources.files("fastgeo.app") / "paper_figure2.json").read_text()
    return {name: values for name, values in json.loads(text).items() if name != "source"}


def _title(report: Mapping) -> str:
    c = report["config"]
    data = FilePath(c["data"]).name  # of an npz, the file only
    return f"{network(c)}, on {data}; N = {c['points']}"
