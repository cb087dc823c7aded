"""Figures and tables show the numbers of an evaluation, and can be told apart."""

import subprocess
import sys
import warnings
from itertools import combinations
from pathlib import Path as FilePath

import pytest
import torch
from conftest import images

import benchmarks
from fastgeo import Evaluation, SplitEvaluation, evaluate, figures
from fastgeo.app import plot, report
from fastgeo.figures import PALETTE, compare
from fastgeo.store.files import read_json, write_json

DIGITS = FilePath(benchmarks.__file__).parent / "results" / "digits"


@pytest.fixture
def digits():
    """The report of a run."""
    return read_json(DIGITS / "report.json")


@pytest.fixture
def evaluation(path, module):
    data = images(20), torch.arange(20) % 5
    return evaluate(path, module, {"train": data, "test": (data[0][:7], data[1][:7])})


def shown(figure):
    """All words in a figure."""
    figure.draw_without_rendering()
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        words += [axes.get_xlabel(), axes.get_ylabel(), axes.get_title()]
        words += [text.get_text() for text in axes.texts]
    return words


def test_loss_and_accuracy_are_those_of_the_report(digits):
    figure = plot.loss_figure(digits)
    linear, logarithmic, accuracy = figure.axes
    for axes, key in ((linear, "loss"), (logarithmic, "loss"), (accuracy, "accuracy")):
        drawn = [list(line.get_ydata()) for line in axes.get_lines()]
        paths = digits["paths"]
        assert drawn == [paths[name][split][key] for name in paths for split in ("train", "test")]
        assert list(axes.get_lines()[0].get_xdata())[::12] == [0, 0.5, 1]
    assert logarithmic.get_yscale() == "log" and linear.get_ylim()[0] == 0
    assert not linear.collections  # published values are of another network
    words = shown(figure)
    assert {"line", "matched line", "Bezier curve", "train", "test"} <= set(words)
    assert "resnet8 of width 0.5, on digits; N = 25" in words


def test_the_geodesic_takes_a_tenth_of_the_log_panel():
    """On the linear axis its losses lie on each other, at the bottom."""
    report = read_json(DIGITS / "report-geodesic.json")
    logarithmic = plot.loss_figure(report).axes[1]
    train = report["paths"]["geodesic"]["train"]["loss"]
    places = logarithmic.transAxes.inverted().transform(
        logarithmic.transData.transform([(0.5, min(train)), (0.5, max(train))])
    )
    assert places[1][1] - places[0][1] > 0.1


@pytest.mark.parametrize("dpi", [72, 300])
def test_the_legend_covers_no_panel_and_the_figure_fits_a_column(digits, dpi):
    metrics = [dict(step=i, sqrt_jsd=1.0, euclidean=16 + i / 50, points=5) for i in range(9)]
    for figure in (plot.loss_figure(digits), plot.length_figure(metrics, digits)):
        figure.set_dpi(dpi)
        figure.draw_without_rendering()
        assert figure.get_figwidth() <= 3.5  # inches
        whole = figure.bbox
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1
            for legend in figure.legends:
                assert not box.overlaps(legend.get_window_extent())


def test_the_papers_values_are_marked_on_its_own_network():
    report = read_json(DIGITS / "report-geodesic.json")
    papers = dict(model="resnet20", width=4, points=25, data="npz:/data/cifar10.npz")
    figure = plot.loss_figure(report | {"config": report["config"] | papers})
    for axes in figure.axes[:2]:
        places = {c.get_label(): dict(c.get_offsets().tolist()) for c in axes.collections}
        assert len(places) == 4 and places["published: geodesic, test"][0] == 0.277
        assert places["published: matched line, augmented train"][0.5] == 0.793
    assert "published" in shown(figure)


def test_lengths_have_whole_steps_and_an_axis_from_zero_and_say_where_points_were_inserted():
    metrics = [
        dict(step=i, sqrt_jsd=1 / (1 + i), euclidean=16 + i / 50, points=5 if i < 2 else 9)
        for i in range(4)
    ]
    figure = figures.lengths(metrics, title="four steps")
    upper, lower = figure.axes
    for axes, key in ((upper, "sqrt_jsd"), (lower, "euclidean")):
        line, inserted = axes.get_lines()
        assert list(line.get_ydata()) == [m[key] for m in metrics]
        assert list(inserted.get_xdata()) == [1.5, 1.5]
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > max(m[key] for m in metrics)
    words = shown(figure)
    assert "N = 9" in words and "N = 5" not in words and "√nats" in upper.get_ylabel()
    ticks = [t for t in lower.get_xticks() if 0 <= t <= 3]
    assert ticks == [round(t) for t in ticks] and len(ticks) >= 3
    for line in metrics:
        del line["points"]
    assert len(figures.lengths(metrics).axes[0].get_lines()) == 1


def test_the_styles_can_be_told_apart():
    """Each two by the marker and the dashes, and the three paths by their grey, too."""
    for one, other in combinations(PALETTE, 2):
        assert one.marker != other.marker and one.dashes != other.dashes
        assert one.colour != other.colour
    for found in figures.OPTIMISED:
        colours = [style.colour for style in figures.styles(["linear", "matched", found]).values()]
        for one, other in combinations(colours, 2):
            assert abs(grey(one) - grey(other)) > 0.1
            assert distance(deuteranopic(one), deuteranopic(other)) > 0.2
    names = ["linear", "geodesic", "bezier", *"abcd"]
    assert len(set(figures.styles(names).values())) == 7
    assert len(figures.styles(map(str, range(20)))) == 20  # more than there are


def rgb(colour):
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def grey(colour):
    """Rec. 601, as printers have it."""
    return sum(w * x for w, x in zip((0.299, 0.587, 0.114), rgb(colour), strict=True))


def deuteranopic(colour):
    """Machado, Oliveira, Fernandes (2009), severity 1, in linear RGB."""
    matrix = torch.tensor(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    )
    x = torch.tensor(rgb(colour))
    linear = torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    seen = (matrix @ linear).clamp(0, 1)
    return torch.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)


def distance(x, y):
    return (x - y).norm().item()


def test_the_summary_has_the_numbers_of_the_report(digits):
    path = digits["paths"]["bezier"]
    train, test = path["train"], path["test"]
    for path_of_line in digits["paths"].values():
        for split in ("train", "test"):
            path_of_line[split]["mean"] = sum(path_of_line[split]["loss"]) / 25
    row = next(
        line for line in report.summary(digits).splitlines() if line.startswith("Bezier curve")
    )
    numbers = [max(train["loss"]), max(test["loss"]), train["mean"], test["mean"]]
    numbers += [train["barrier"], test["barrier"]]
    numbers += [100 * min(split["accuracy"]) for split in (train, test)]
    numbers += [path["sqrt_jsd"], path["fisher_rao"], path["euclidean"]]
    assert [float(word) for word in row.split()[2:]] == pytest.approx(numbers, abs=0.051)
    assert max(map(len, report.summary(digits).splitlines())) <= 100


def test_an_evaluation_shows_itself(evaluation):
    """In a few lines, with units, and as a table in a notebook."""
    text, split = repr(evaluation), evaluation.splits["test"]
    assert text.startswith("Evaluation of 7 points\n") and text.endswith(str(evaluation.table()))
    rows = {line[:40].strip(): line[40:].split() for line in text.splitlines()[2:]}
    both = evaluation.splits["train"], split
    for key, name in (
        ("mean", "mean loss along arc length, nats"),
        ("integral", "loss integrated along arc length, nats"),
    ):
        assert rows[name] == [f"{getattr(s, key):.3f}" for s in both]
    assert rows["highest loss, nats"] == [f"{max(s.loss):.3f}" for s in both]
    assert rows["lowest accuracy, %"] == [f"{100 * min(s.accuracy):.1f}" for s in both]
    assert rows["barrier over the mean of the ends, nats"] == [f"{s.barrier:.3f}" for s in both]
    assert rows["Fisher-Rao, rad"] == [f"{evaluation.fisher_rao:.4f}"]
    assert f"highest loss {max(split.loss):.3f} nats" in repr(split) and len(repr(split)) < 160
    table = evaluation._repr_html_()
    assert table.count("<tr>") == len(rows) + 1 and f"<td>{evaluation.energy:.4f}</td>" in table
    assert evaluation.table().markdown().splitlines()[0] == "|  | train | test |"


def test_evaluations_are_drawn_by_themselves_and_together(evaluation):
    figure = evaluation.plot(title="mine")
    assert "mine" in shown(figure) and len(figure.axes[0].get_lines()) == 2
    other = Evaluation({"train": evaluation.splits["train"]}, 0, 0, 0, 0, 0)
    figure = evaluation.plot({"other": other}, name="first")
    assert [line.get_label() for line in figure.axes[0].get_lines()] == [
        "first, train",
        "other, train",
    ]
    assert {"first", "other"} <= set(shown(figure))
    perfect = SplitEvaluation([0.0] * 3, [1.0] * 3, 0.0, 0.0, 0.0, 0.0)
    with warnings.catch_warnings(action="error"):  # a logarithmic axis has no place for 0
        Evaluation({"<&>": perfect}, 0, 0, 0, 0, 0).plot().draw_without_rendering()
    assert "&lt;&amp;&gt;" in Evaluation({"<&>": perfect}, 0, 0, 0, 0, 0)._repr_html_()


def test_runs_and_evaluations_are_compared(evaluation, digits, tmp_path):
    content = {key: digits[key] for key in ("config", "paths")}
    write_json(tmp_path / "report.json", content)
    both = compare({"mine": evaluation, "run": tmp_path})
    mine, run = str(both).splitlines()[3:]
    highest = {name: f"{max(own['train']['loss']):.3f}" for name, own in digits["paths"].items()}
    assert mine.split()[0] == "mine" and run.split()[:2] == ["run", highest["bezier"]]
    assert str(both) == str(both.table()) and both._repr_html_().count("<tr>") == 3
    drawn = both.plot().axes[0].get_lines()
    assert list(drawn[2].get_ydata()) == digits["paths"]["bezier"]["train"]["loss"]
    line = compare([str(tmp_path)], path="matched")
    assert str(tmp_path) in str(line) and f" {highest['matched']} " in str(line)
    other = Evaluation({"else": evaluation.splits["test"]}, 0, 0, 0, 0, 0)
    for runs, words in (
        ({}, "at least one run folder or evaluation"),
        ({"a": evaluation, "b": other}, "no split in common .*a: train, test; b: else"),
        ([tmp_path / "none"], "cannot read .*none/report.json: there is no such file"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(runs)
    with pytest.raises(ValueError, match="one of linear, matched, optimised, got 'straight'"):
        compare([tmp_path], path="straight")


@pytest.mark.parametrize(
    "suffix, start", [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_figures_are_written_in_the_format_of_their_name(digits, tmp_path, suffix, start):
    file = tmp_path / f"figure.{suffix}"
    figures.write_figure(file, plot.loss_figure(digits))
    assert file.read_bytes().startswith(start)


def test_a_notebook_shows_figures(evaluation):
    """By IPython's protocol, which needs no pyplot."""
    shown = evaluation.plot()._repr_png_()
    assert shown.startswith(b"\x89PNG")


def test_matplotlib_is_imported_when_a_figure_is_drawn():
    code = "import sys, fastgeo.app.stages; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_own_networks_and_loaders_are_called_what_they_are(digits):
    """They have no width, and batches of their own."""
    own = digits | {"config": digits["config"] | dict(model="net:build", data="net:loaders")}
    own["batch_size"] = 64
    assert "net:build, on net:loaders; N = 25" in shown(plot.loss_figure(own))
    text = report.markdown(own)
    assert "width" not in text and "batch of 128" not in text
    assert "a batch of the loader, the first of which has 64 inputs" in text
    for name in ("batch_size", "train_batch_size", "eval_batch_size", "augment", "norm"):
        assert f"`{name}`" not in text and f"`{name}`" in report.markdown(digits)
    whole = digits["matching"] | {"left_out": ["all from sweep 6 on of start 2"]}
    assert "work than the first: all from sweep 6 on" in report.markdown(own | {"matching": whole})
    assert "Left out" not in text
    text = report.markdown(digits)
    assert "width 0.5" in text and "a batch of 128 images" in text


def test_matching_is_told_in_a_sentence(digits):
    found = digits["matching"] | dict(objectives=[2.0], objective_after=2.0, sweeps=1)
    text = report.markdown(digits | {"matching": found})
    assert "is 2.00 after 1 sweep over all permutations. The outputs" in text
    found |= dict(objectives=[2.0, 3.0], objective_after=3.0, sweeps=5)
    text = report.markdown(digits | {"matching": found})
    assert "is 3.00 after 5 sweeps over all permutations, the best of 2 starts (2.00, 3.00)" in text
