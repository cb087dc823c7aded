"""Runs by every method: curves are reported, drawn, compared and gone on with as geodesics are; and
the plane around the path of a run."""

import os
import re
import shutil
import signal
from pathlib import Path as FilePath

import pytest
import torch
import torch.nn.functional as F
from commands import FILES, SMALL, refused
from torch.func import functional_call

import fastgeo
from benchmarks.curves import networks
from fastgeo import Path, models
from fastgeo.app import plot
from fastgeo.app.cli import main
from fastgeo.app.config import CURVES, PRESETS, chosen
from fastgeo.app.folder import Run
from fastgeo.data.images import load
from fastgeo.store.checkpoint import Checkpoints
from fastgeo.store.files import read_json, read_tensors

TITLES = {"geodesic": "geodesic", "bezier": "Bezier curve", "polychain": "polychain"}
PLANE = {"plane.json", "plane.png"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Method -> the folder of a small run by it, with the same ends."""
    folder = tmp_path_factory.mktemp("runs")
    main(["run", "--out", str(folder / "geodesic"), *SMALL, "--method", "geodesic", "--lr", "0.1"])
    for method in ("bezier", "polychain"):
        shutil.copytree(folder / "geodesic", folder / method)
        main(["optimize", str(folder / method), "--overwrite", "--method", method])
        main(["run", "--out", str(folder / method), "--resume"])
    return {method: folder / method for method in TITLES}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def on_the_curve(method: str, a, c, b, t: float):
    """Of a curve with one control point c, or of the points between the ends; by definition."""
    if method == "bezier":
        return (1 - t) ** 2 * a + 2 * t * (1 - t) * c[0] + t**2 * b
    points = [a, *c, b]
    edge = min(int(t * (len(points) - 1)), len(points) - 2)
    share = t * (len(points) - 1) - edge
    return (1 - share) * points[edge] + share * points[edge + 1]


@pytest.mark.parametrize("method", TITLES)
def test_a_run_evaluates_the_n_points_of_its_path(runs, method):
    """Their losses, and the integral along arc length, by definition from the weights on disk."""
    report = read_json(runs[method] / "report.json")
    assert list(report["paths"]) == ["linear", "matched", method]
    found, parts = report["paths"][method], read_tensors(runs[method] / "path.safetensors", "path")
    assert len(parts["interior"]["conv1.weight"]) == (3 if method == "geodesic" else 1)
    digits = load("digits", train_subset=200)
    x, y = digits.normalize(digits.train.images), digits.train.labels
    module, losses, states = models.resnet(8, 0.25, in_channels=1), [], []
    for i in range(5):
        state = {
            name: on_the_curve(method, a, parts["interior"][name], parts["end"][name], i / 4)
            for name, a in parts["start"].items()
        }
        losses.append(F.cross_entropy(functional_call(module, state, (x,)), y).item())
        states.append(torch.cat([tensor.flatten() for tensor in state.values()]).double())
    assert found["train"]["loss"] == pytest.approx(losses, rel=1e-3)
    steps = [(states[i + 1] - states[i]).norm().item() for i in range(4)]
    integral = sum(steps[i] * (losses[i] + losses[i + 1]) / 2 for i in range(4))
    assert found["euclidean"] == pytest.approx(sum(steps), rel=1e-3)
    assert found["train"]["integral"] == pytest.approx(integral, rel=1e-3)
    assert found["train"]["mean"] == pytest.approx(integral / sum(steps), rel=1e-3)


@pytest.mark.parametrize("method", TITLES)
def test_a_run_calls_its_path_by_the_method(runs, method, capsys):
    folder, title = runs[method], TITLES[method]
    assert {file.name for file in folder.iterdir()} == FILES
    text = (folder / "report.md").read_text()
    assert text.startswith(f"# {title[0].upper()}{title[1:]} between two trained networks\n")
    rows = [line.split(" |")[0] for line in text.splitlines() if line.startswith("| ")]
    assert rows.count(f"| {title}") == 3 and f"The *{title}*" in text
    assert ("at 3 random places in each step" in text) == (method != "geodesic")
    assert ("`controls`" in text) == (method != "geodesic") and "with few" not in text
    figure = plot.loss_figure(read_json(folder / "report.json"))
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [word for word in words if word in TITLES.values()] == [title]
    assert f"\n{title} " in Run.open(folder).summary()


def test_a_geodesic_is_the_method_that_a_name_goes_back_to(runs):
    shutil.copytree(runs["bezier"], "r")
    main(["optimize", "r", "--overwrite", "--method", "geodesic"])
    for name in ("path.safetensors", "metrics.jsonl"):
        assert FilePath("r", name).read_bytes() == (runs["geodesic"] / name).read_bytes()
    main(["optimize", "r", "--overwrite", "--spacing", "release"])
    path = FilePath("r/path.safetensors").read_bytes()
    assert path != (runs["geodesic"] / "path.safetensors").read_bytes()


def test_a_curve_costs_what_the_presets_geodesic_does_and_is_the_default_for_digits():
    """In passes of one network on a batch."""
    main(["train", "--out", "r", *SMALL[:6], *SMALL[12:]])
    assert Run.open(FilePath("r")).config.method == "bezier"
    for preset, geodesic in PRESETS.items():
        assert chosen(preset, "geodesic") == geodesic
        curve = chosen(preset, "bezier")
        assert chosen(preset) == (curve if preset == "digits" else geodesic)
        if preset in CURVES:
            cost = curve.path.steps * curve.descent.nodes
            assert cost == pytest.approx(networks(geodesic, 1), abs=curve.descent.nodes)


def test_a_method_sets_what_can_also_be_set_by_itself(runs):
    for argv, expected in (
        (["--method", "bezier"], ("bezier", 1, "jsd", 3)),
        (["--curve", "bezier", "--controls", "2"], ("bezier", 2, "jsd", None)),
        (
            ["--method", "polychain", "--nodes", "1", "--objective", "cross_entropy"],
            ("polychain", 1, "cross_entropy", 1),
        ),
    ):
        shutil.copytree(runs["geodesic"], "r", dirs_exist_ok=True)
        main(["optimize", "r", "--overwrite", *argv])
        config = read_json(FilePath("r/config.json"))["config"]
        assert tuple(config[k] for k in ("curve", "controls", "objective", "nodes")) == expected
        path = Path.load("r/path.safetensors")
        assert (path.kind, path.basis.size, len(path)) == (expected[0], expected[1] + 2, 5)
        assert "method" not in config
    main(["run", "--out", "r", "--resume"])
    text = FilePath("r/report.md").read_text()
    assert "*polychain*, of 1 bend, began" in text
    assert "at 1 random place in each step, on the labels" in text
    assert "The energy is the sum" in text


@pytest.mark.parametrize(
    "settings",
    [
        ["--method", "bezier"],
        ["--method", "polychain", "--objective", "cross_entropy", "--nodes", "1"],
        ["--curve", "bezier", "--controls", "3"],  # which begins with one, and rises by degrees
    ],
    ids=["bezier", "polychain", "three control points"],
)
def test_a_run_by_any_method_goes_on_from_every_stop_to_the_same_result(
    runs, settings, monkeypatch, capsys
):
    """To the last bit: path, log and report. It is stopped before each step, and at the end."""
    shutil.copytree(runs["geodesic"], "uncut")
    main(["optimize", "uncut", "--overwrite", *settings])
    shutil.copytree("uncut", "begun")
    main(["run", "--out", "uncut", "--resume"])
    stop, real = [0], Checkpoints.reached

    def reached(self, state, **options):
        if state.step == stop[0]:
            signal.raise_signal(signal.SIGINT)
        real(self, state, **options)

    monkeypatch.setattr(Checkpoints, "reached", reached)
    shutil.copytree("begun", "r")
    for stop[0] in range(5):
        how = ["--overwrite"] if stop[0] == 0 else ["--resume"]
        with pytest.raises(SystemExit) as stopped:
            main(["optimize", "r", *how])
        assert stopped.value.code == 130
        assert max(os.listdir("r/checkpoint")) == f"optimize-{stop[0]:09}"
    stop[0] = None
    main(["run", "--out", "r", "--resume"])
    for name in ("path.safetensors", "metrics.jsonl", "path_loss.png", "path_length.png"):
        assert FilePath("r", name).read_bytes() == FilePath("uncut", name).read_bytes(), name
    both = [read_json(FilePath(name, "report.json"))["paths"] for name in ("r", "uncut")]
    assert both[0] == both[1]
    assert "--nodes is " in refused(capsys, "run", "--out", "r", "--resume", "--nodes", "7")


def test_an_engine_that_was_chosen_at_random_nodes_is_kept(runs):
    shutil.copytree(runs["bezier"], "r")
    main(["optimize", "r", "--overwrite", "--engine", "auto", "--steps", "9"])
    run = Run.open(FilePath("r"))
    assert run.engines["optimize"]["points"] == 3
    forward, on_choice = run.forward("optimize")
    assert on_choice is None and forward.engine == run.engines["optimize"]["engine"] != "auto"


def test_runs_by_different_methods_are_compared(runs, capsys):
    folders = [str(runs[method]) for method in ("geodesic", "bezier")]
    main(["compare", *folders])
    said = capsys.readouterr().out
    table = fastgeo.compare(folders).table()
    assert str(table) in said and [row[0] for row in table.rows] == folders
    for row, method in zip(table.rows, ("geodesic", "bezier"), strict=True):
        losses = read_json(runs[method] / "report.json")["paths"][method]["train"]["loss"]
        assert row[1] == f"{max(losses):.3f}"
    main(["compare", *folders, "--path", "matched"])
    first, second = fastgeo.compare(folders, path="matched").table().rows
    assert first[1:] == second[1:]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["run", "--method", "spline"], "method must be one of geodesic, bezier, polychain, got "),
        (
            ["run", "--curve", "points", "--controls", "2"],
            "--controls are those of a curve",
        ),
        (["run", "--method", "bezier", "--controls", "24"], "controls must be within 1..23, got"),
        (["run", "--method", "bezier", "--nodes", "0"], "nodes must be at least 1, got 0"),
        (["run", "--method", "bezier", "--spacing", "release"], "leave out --spacing"),
        (["profile", "--curve", "bezier"], "steps at the points of a geodesic only; leave out"),
        (["profile", "--nodes", "3"], "steps at the points of a geodesic only; leave out"),
        (["plane", "nowhere"], "nowhere holds no run (no config.json); start one with: fastgeo"),
        (["plane", "r", "--size", "2"], "size must be at least 3, got 2"),
    ],
)
def test_what_no_method_can_do_gets_one_sentence(capsys, argv, words):
    assert words in refused(capsys, *argv)
    assert os.listdir(".") == []


# --- The plane ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_plane(runs, tmp_path_factory):
    """A run by a Bezier curve and its plane, of 4 x 4 networks."""
    folder = tmp_path_factory.mktemp("plane") / "r"
    shutil.copytree(runs["bezier"], folder)
    main(["plane", str(folder), "--size", "4"])
    return folder


def test_the_plane_of_a_run_is_that_of_its_path_on_its_images(with_plane):
    assert {file.name for file in with_plane.iterdir()} == FILES | PLANE
    found = read_json(with_plane / "plane.json")
    digits, path = load("digits", train_subset=200), Path.load(with_plane / "path.safetensors")
    images = digits.normalize(digits.train.images), digits.train.labels
    module = models.resnet(8, 0.25, in_channels=1)
    expected = fastgeo.plane(path, module, images, size=4).to_json()
    assert found.pop("split") == "train" and found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.tensor(found[key]).allclose(torch.tensor(value), rtol=1e-4, atol=1e-5), key
    report = read_json(with_plane / "report.json")
    assert found["path_loss"] == pytest.approx(report["paths"]["bezier"]["train"]["loss"], rel=1e-4)


def test_the_plane_is_drawn_as_plot_draws_and_drawn_again_by_it(with_plane, capsys):
    shutil.copytree(with_plane, "r")
    how = ["--format", "svg", "--dpi", "50", "--split", "test", "--size", "3"]
    main(["plane", "r", *how, "--quiet"])
    said = capsys.readouterr()
    assert said.out.startswith("Plane(3 x 3 networks: loss ") and said.err == ""
    assert said.out.endswith("\nr/plane.png\n")
    assert set(os.listdir("r")) == FILES | PLANE | {"plane.svg"}
    svg = FilePath("r/plane.svg").read_text()
    assert "resnet8 of width 0.25, on digits; N = 5, test" in svg
    assert int.from_bytes(FilePath("r/plane.png").read_bytes()[16:20], "big") == 170
    shutil.copy(with_plane / "plane.json", "r")
    main(["plot", "r"])
    assert set(os.listdir("r")) == FILES | PLANE
    assert FilePath("r/plane.png").read_bytes() == (with_plane / "plane.png").read_bytes()
    main(["run", "--out", "r", "--resume"])  # nothing is damaged


def test_the_plane_goes_when_its_path_goes(with_plane):
    shutil.copytree(with_plane, "r")
    main(["evaluate", "r", "--overwrite"])
    assert PLANE <= set(os.listdir("r"))
    main(["optimize", "r", "--overwrite", "--steps", "2"])
    assert not PLANE & set(os.listdir("r"))


def test_no_plane_of_a_run_that_is_not_finished_or_is_damaged(with_plane, capsys):
    shutil.copytree(with_plane, "r")
    FilePath("r/path.safetensors").write_bytes(b"no path")
    assert "cannot read r/path.safetensors: it is not as optimize left it" in refused(
        capsys, "plane", "r"
    )
    shutil.copytree(with_plane, "s")
    main(["optimize", "s", "--overwrite", "--steps", "2"])
    assert refused(capsys, "plane", "s") == (
        "fastgeo: s has no report.json yet; make it with: fastgeo evaluate s"
    )


def test_help_tells_of_the_plane_and_the_methods(capsys):
    for argv, words in (
        (["--help"], ["plane"]),
        (["plane", "--help"], ["--size", "--split", "--format", "--dpi", "--title"]),
        (["run", "--help"], ["--method {geodesic,bezier,polychain}", "--curve", "--controls"]),
        (["run", "--method", "bezier", "--help"], ["(default: bezier)", "(default: 3)"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
        assert stopped.value.code == 0 and all(word in text for word in words), argv
