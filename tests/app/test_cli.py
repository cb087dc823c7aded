"""The command line: whole runs in a small setting, stage by stage, and everything it refuses."""

import csv
import glob
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path as FilePath

import numpy as np
import pytest
import safetensors.torch
import torch
from commands import FILES, SMALL, WEIGHTS, refused
from torch.func import functional_call

import fastgeo
from fastgeo import Descent, Path, evaluate, models
from fastgeo.app import plot, report
from fastgeo.app.cli import _Lines, main
from fastgeo.app.config import PRESETS, Config, about
from fastgeo.app.folder import Run
from fastgeo.app.given import Given
from fastgeo.data.images import load
from fastgeo.store.files import read_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of one small run."""
    folder = tmp_path_factory.mktemp("run") / "small"
    main(["run", "--out", str(folder), *SMALL])
    return folder


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_leaves_every_file_and_nothing_else(run):
    assert {file.name for file in run.iterdir()} == FILES
    for name in ("path_loss.png", "path_length.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")


def test_the_report_agrees_with_the_weights_on_disk(run):
    report = json.loads((run / "report.json").read_text())
    assert report["schema"] == 1 and report["config"]["points"] == 5
    assert set(report["seconds"]) == {"train", "match", "optimize", "evaluate", "total"}
    digits = load("digits", train_subset=200)
    x, y = digits.normalize(digits.train.images), digits.train.labels
    path, module = Path.load(run / "path.safetensors"), models.resnet(8, 0.25, in_channels=1)
    found = report["paths"]["bezier"]
    for t, loss, accuracy in zip(
        np.linspace(0, 1, 5), found["train"]["loss"], found["train"]["accuracy"], strict=True
    ):
        module.load_state_dict(path.at(t))
        logits = module(x)
        assert torch.nn.functional.cross_entropy(logits, y).item() == pytest.approx(loss, rel=1e-4)
        assert (logits.argmax(1) == y).float().mean().item() == pytest.approx(accuracy)
    again = evaluate(path, module, {"train": (x, y)})
    for key in ("energy", "sqrt_jsd", "fisher_rao", "fisher_rao_lower_bound", "euclidean"):
        assert found[key] == pytest.approx(getattr(again, key), rel=1e-4)
    assert found["augmented_train"] is None


def test_the_three_paths_are_between_the_same_networks(run):
    report = json.loads((run / "report.json").read_text())["paths"]
    for split in ("train", "test"):
        ends = [[report[name][split]["loss"][i] for i in (0, -1)] for name in report]
        assert ends[0] == pytest.approx(ends[1], rel=1e-4)
        assert ends[1] == pytest.approx(ends[2], rel=1e-4)
    assert report["matched"]["euclidean"] < report["linear"]["euclidean"]
    assert report["bezier"]["energy"] < report["matched"]["energy"]
    for path in report.values():
        assert path["fisher_rao"] >= path["fisher_rao_lower_bound"]


def test_metrics_have_a_line_a_step(run):
    for name, steps in (("metrics.jsonl", 4), ("training.jsonl", 20)):
        lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(steps))
    assert set(lines[0]) == {"step", "loss", "lr"} and len(lines[0]["loss"]) == 2


def test_the_report_is_readable(run):
    text = (run / "report.md").read_text()
    for words in ("path_loss.png", "matched line", "Fisher-Rao, rad", "barrier above", "| total |"):
        assert words in text


def test_stages_one_by_one_are_the_run(run):
    main(["train", "--out", "staged", *SMALL[:6], *SMALL[12:]])
    main(["match", "staged"])
    main(["optimize", "staged", *SMALL[6:12]])
    main(["evaluate", "staged"])
    main(["plot", "staged"])
    assert set(os.listdir("staged")) == FILES
    for name in WEIGHTS:
        with open(f"staged/{name}", "rb") as staged:
            assert staged.read() == (run / name).read_bytes()
    with open("staged/report.json") as staged:
        assert json.load(staged)["paths"] == json.loads((run / "report.json").read_text())["paths"]


def test_two_runs_with_one_seed_are_identical(run):
    main(["run", "--out", "again", *SMALL])
    for name in (*WEIGHTS, "metrics.jsonl", "training.jsonl"):
        with open(f"again/{name}", "rb") as again:
            assert again.read() == (run / name).read_bytes(), name


def test_a_stage_done_again_takes_the_runs_settings_and_drops_what_came_after(capsys):
    main(["run", "--out", "r", *SMALL])
    assert "r/path.safetensors exists already; --overwrite" in refused(capsys, "optimize", "r")
    main(["optimize", "--overwrite", "--no-precondition", "r"])  # flags first, too
    config = json.loads(open("r/config.json").read())
    assert config["config"]["points"] == 5 and config["config"]["batch_size"] == 50
    assert config["config"]["steps"] == 4 and config["config"]["precondition"] is False
    assert set(config["stages"]) == {"train", "match", "optimize"}
    assert not os.path.exists("r/report.json") and not os.path.exists("r/path_loss.png")
    assert "has no report.json yet; make it with: fastgeo evaluate r" in refused(
        capsys, "plot", "r"
    )


@pytest.mark.parametrize(
    "stage, file, option",
    [
        ("run", "ends.safetensors", "--seed-a=7"),
        ("run", "ends.safetensors", "--weight-decay=0.1"),
        ("run", "ends.safetensors", "--norm=channel"),
        ("match", "permutation.safetensors", "--match-sweeps=1"),
        ("match", "permutation.safetensors", "--match-seed=6"),
        ("match", "permutation.safetensors", "--match-restarts=3"),
        ("match", "permutation.safetensors", "--match-method=activations"),
        ("optimize", "path.safetensors", "--controls=2"),
        ("optimize", "path.safetensors", "--path-seed=3"),
        ("optimize", "path.safetensors", "--lr=0.3"),
        ("optimize", "path.safetensors", "--momentum=0"),
        ("optimize", "path.safetensors", "--lr-schedule=constant"),
        ("optimize", "path.safetensors", "--precision=bf16"),
        ("optimize", "path.safetensors", "--no-precondition"),
    ],
)
def test_the_settings_reach_the_stages(run, stage, file, option):
    """Each of these settings changes what its stage leaves, and nothing before it."""
    base = {name: (run / name).read_bytes() for name in WEIGHTS}
    if stage == "run":
        main(["run", "--out", "changed", *SMALL, option])
    else:
        shutil.copytree(run, "changed")
        main([stage, "changed", "--overwrite", option])
    for name in WEIGHTS[: WEIGHTS.index(file) + 1]:
        with open(f"changed/{name}", "rb") as now:
            assert (now.read() == base[name]) == (name != file)


def test_an_mlp_a_mixed_norm_and_augmentation_run_too():
    main(["run", "--out", "mlp", *SMALL, "--model", "mlp"])
    options = ["--norm", "channel", "--augment", "flip-crop"]
    main(["run", "--out", "channel", *SMALL, *options])
    report = json.loads(open("channel/report.json").read())
    assert len(report["paths"]["matched"]["augmented_train"]["loss"]) == 5
    train = report["paths"]["bezier"]["train"]["loss"]
    assert train != report["paths"]["bezier"]["augmented_train"]["loss"]
    assert "augmented train" in open("channel/report.md").read()


def test_npz_data_runs():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 90), ("test", 30)):
        arrays[f"y_{split}"] = np.arange(count) % 3
        noise = rng.integers(0, 50, (count, 8, 8, 3))
        arrays[f"x_{split}"] = (noise + 60 * arrays[f"y_{split}"][:, None, None, None]).astype("u1")
    np.savez("data.npz", **arrays)
    options = ["--epochs", "20", "--points", "5", "--steps", "4", "--seed-a", "4", "--seed-b", "5"]
    small = ["--width", "0.25", "--batch-size", "50", "--train-batch-size", "20"]
    main(["run", "--data", "npz:data.npz", "--out", "r", *small, *options])
    report = json.loads(open("r/report.json").read())["paths"]["bezier"]
    assert report["test"]["accuracy"][0] == report["test"]["accuracy"][-1] == 1
    os.mkdir("elsewhere")
    os.chdir("elsewhere")  # the run knows its data from anywhere
    main(["evaluate", "../r", "--overwrite"])


def test_the_match_stage_refuses_a_permutation_that_changes_the_function(capsys, monkeypatch):
    from fastgeo import PermutationSpec

    def wrong(spec, state, permutations):
        new = real(spec, state, permutations)
        if permutations:
            new["norm1.weight"][:2] += torch.tensor([0.1, -0.1])
        return new

    real = PermutationSpec.permute
    monkeypatch.setattr(PermutationSpec, "permute", wrong)
    assert "does not compute what b does" in refused(capsys, "run", "--out", "r", *SMALL)
    assert not os.path.exists("r/permutation.safetensors")


def test_figures_and_summary_show_the_numbers_of_the_report(run):
    content = json.loads((run / "report.json").read_text())
    drawn = plot.loss_figure(content).axes[0].get_lines()
    expected = [content["paths"][n][s]["loss"] for n in content["paths"] for s in ("train", "test")]
    assert [list(line.get_ydata()) for line in drawn] == expected
    assert list(drawn[0].get_xdata()) == [0, 0.25, 0.5, 0.75, 1]
    assert not plot.loss_figure(content).axes[0].collections  # the paper's values are not its own
    row = next(
        line for line in report.summary(content).splitlines() if line.startswith("Bezier curve")
    ).split()[1:]
    path = content["paths"]["bezier"]
    splits = [path[split] for split in ("train", "test")]
    numbers = [max(split["loss"]) for split in splits]
    numbers += [split[key] for key in ("mean", "barrier") for split in splits]
    assert [float(word) for word in row[1:7]] == pytest.approx(numbers, abs=0.00051)
    numbers = [100 * min(split["accuracy"]) for split in splits]
    assert [float(word) for word in row[7:9]] == pytest.approx(numbers, abs=0.051)
    numbers = [path["sqrt_jsd"], path["fisher_rao"], path["euclidean"]]
    assert [float(word) for word in row[9:]] == pytest.approx(numbers, abs=0.0051)


@pytest.mark.parametrize(
    "argv, words",
    [
        (
            ["--preset", "nope"],
            "preset must be one of digits, cifar10, text, paper-small, paper, .*, got 'nope'",
        ),
        (["--data", "nope"], "data must be one of digits, cifar10, .*, got 'nope'"),
        (["--model", "vgg"], "model must be resnet8, .*, mlp or gpt, .*, got 'vgg'"),
        (["--model", "resnet9"], r"depth must be 6 k \+ 2"),
        (["--data", "npz:none.npz"], "none.npz: there is no such file"),
        (["--points", "2"], "points must be at least 3"),
        (["--lr", "0"], "lr must be positive, got 0"),
        (["--momentum", "1"], "momentum must be within 0..1, and less than 1, got 1"),
        (["--train-lr", "-1"], "train-lr must be positive, got -1"),
        (["--batch-size", "0"], "batch-size must be at least 1, got 0"),
        (["--train-batch-size", "-3"], "train-batch-size must be at least 1, got -3"),
        (["--batch-size", "1438"], "batch-size 1438 is larger than the data set: 1437"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--train-subset", "9999"], "train-subset must be within 1..1437"),
        (["--device", "nonsense"], "device 'nonsense' cannot be used"),
        (["--device", "meta"], "device 'meta' cannot be used: fastgeo runs on cpu and cuda"),
        (["--width", "inf"], "width must be above 0 and at most 1000, got inf"),
        (["--lr", "nan"], "lr must be positive, got nan"),
        (["--lr-start-divisor", "0"], "lr-start-divisor must be positive"),
        (["--warmup-fraction", "2"], "warmup-fraction must be within 0..1, got 2"),
        (["--weight-decay", "-1"], "weight-decay must be within 0..1"),
        (["--match-seed", "-1"], "match-seed must be within 0.."),
        (["--epochs", "1", "--train-batch-size", "1000"], "leave fewer than two steps"),
    ],
)
def test_bad_settings_get_one_sentence_and_leave_nothing(capsys, argv, words):
    assert re.search(words, refused(capsys, "run", *argv))
    assert os.listdir(".") == []


def test_a_folder_that_holds_a_run_is_refused_unless_overwritten(run, capsys):
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    assert "already holds a run" in refused(capsys, "run", "--out", run, *SMALL)
    # bad settings are noticed before anything is replaced
    one_step = ["--train-subset", "200", "--epochs", "1", "--train-batch-size", "150"]
    for bad in (["--model", "vgg"], ["--weight-decay", "-1"], one_step):
        refused(capsys, "run", "--out", run, "--overwrite", *bad)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before
    os.mkdir("other")
    open("other/thesis.tex", "w").close()
    assert "is not empty and holds no run" in refused(capsys, "run", "--out", "other")
    assert "is not empty" in refused(capsys, "run", "--out", "other", "--overwrite")
    assert "is a file" in refused(capsys, "run", "--out", "other/thesis.tex")
    assert os.listdir("other") == ["thesis.tex"]
    with open("other/config.json", "w") as foreign:
        foreign.write('{"architectures": ["BertModel"]}')
    assert "holds no run" in refused(capsys, "run", "--out", "other", "--overwrite")
    assert set(os.listdir("other")) == {"thesis.tex", "config.json"}


def test_stages_without_the_one_before_say_which_to_run(capsys):
    assert "holds no run (no config.json)" in refused(capsys, "match", "nowhere")
    main(["train", "--out", "r", *SMALL[:6], *SMALL[12:]])
    assert "r has no permutation.safetensors yet; make it with: fastgeo match r" in refused(
        capsys, "optimize", "r"
    )
    assert "r has no permutation.safetensors yet" in refused(capsys, "plot", "r")
    os.remove("r/ends.safetensors")
    assert "make it with: fastgeo train --out r --overwrite" in refused(capsys, "match", "r")


def test_damaged_run_files_are_named(capsys):
    main(["train", "--out", "r", *SMALL[:6], *SMALL[12:]])
    with open("r/ends.safetensors", "r+b") as stream:
        stream.truncate(1000)
    assert "cannot read r/ends.safetensors" in refused(capsys, "match", "r")
    with open("r/config.json", "w") as stream:
        stream.write('{"schema": 1, "config": {"colour": "red"}}')
    assert "cannot read r/config.json" in refused(capsys, "match", "r")
    with open("r/config.json", "w") as stream:
        stream.write('{"schema": 2}')
    assert (
        "cannot read r/config.json: it has schema 2, which this fastgeo does not know: it reads "
        "schema 1; a newer fastgeo may"
    ) in refused(capsys, "match", "r")
    with open("r/config.json", "w") as stream:
        stream.write("[]")
    assert "cannot read r/config.json" in refused(capsys, "match", "r")


def test_a_diverging_optimisation_keeps_the_last_good_path(capsys):
    sentence = refused(capsys, "run", "--out", "r", *SMALL, "--lr", "1e25")
    assert (
        "stopped at step 1: the divergence of edge 0 is nan, since at point 1 what layer norm1 "
        "gives is not finite; lower lr (now 1e+25); the last good state is in "
        "r/checkpoint/optimize-000000000; with other settings: fastgeo optimize r --overwrite"
    ) in sentence
    path = Path.load("r/checkpoint/optimize-000000000/path.safetensors")
    assert len(path) == 5 and all(t.isfinite().all() for t in path.interior.values())
    assert not os.path.exists("r/path.safetensors")
    sentence = refused(capsys, "run", "--out", "s", *SMALL, "--train-lr", "1e30")
    assert (
        "stopped at step 1 of 20: the loss of network a is nan, since what layer norm1 gives is "
        "not finite; lower train-lr (now 1e+30); the last good state is in "
        "s/checkpoint/train-000000000"
    ) in sentence
    assert sentence == refused(capsys, "run", "--out", "s", "--resume")  # the same to the last bit
    ends = read_tensors(FilePath("s/checkpoint/train-000000000/ends.safetensors"), "ends")
    assert all(t.isfinite().all() for end in ends.values() for t in end.values())


def test_ctrl_c_keeps_what_was_finished_and_says_where():
    process = subprocess.Popen(
        [sys.executable, "-m", "fastgeo.app.cli", "run", "--out", "r", "--steps", "1000000"]
        + ["--width", "0.25", "--epochs", "1", "--train-subset", "200", "--method", "geodesic"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (os.path.exists("r/metrics.jsonl") and os.path.getsize("r/metrics.jsonl") > 500):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: finishing the step; interrupt again to stop at once" in errors
    assert "fastgeo: interrupted; go on with: fastgeo run --out r --resume" in errors
    (saved,) = glob.glob("r/checkpoint/*/path.safetensors")
    assert len(Path.load(saved)) == 5  # of 25, at the beginning
    assert os.path.exists("r/ends.safetensors") and "Traceback" not in errors


def in_another_process(code, **options):
    """A process of its own that is given this Python."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, **options
    )


def test_help_and_version_need_no_torch():
    code = """
import contextlib, io, sys
from fastgeo.app.cli import main
for argv in (["--version"], ["--help"], ["run", "--preset", "paper", "--help"]):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(argv)
    assert said.getvalue()
assert not {"torch", "scipy", "matplotlib"} & set(sys.modules)
"""
    in_another_process(code)
    said = subprocess.run(
        [sys.executable, "-m", "fastgeo", "--version"], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"fastgeo {fastgeo.__version__}\n" and not said.stderr


def test_modules_hide_no_function_of_their_name():
    code = "import fastgeo.evaluate, fastgeo.optimize; from fastgeo import evaluate, optimize; "
    in_another_process(code + "assert callable(evaluate) and callable(optimize)")
    assert set(fastgeo.__all__) <= set(dir(fastgeo))


def test_help_is_grouped_by_what_the_settings_are_of(capsys):
    with pytest.raises(SystemExit):
        main(["optimize", "--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"^\W*((?:[a-z]+ )?(?:options|arguments))\W*$", text, re.MULTILINE)
    assert groups == [
        *("positional arguments", "options", "pace options", "path options"),
        *("descent options", "forward options"),
    ]
    assert "--train-lr" not in text and "--match-seed" not in text and "--chunk" in text


def test_every_setting_has_a_meaning():
    assert about().keys() == PRESETS["digits"].settings.keys() and all(about().values())


def test_progress_is_lines_where_there_is_no_terminal(capsys):
    main(["run", "--out", "r", *SMALL])
    said = capsys.readouterr()
    assert "\r" not in said.err and "train: 100%" in said.err
    assert len(said.err.splitlines()) < 40
    main(["run", "--out", "q", *SMALL, "--quiet"])
    said = capsys.readouterr()
    assert said.err == "" and "Bezier curve" in said.out


def test_lines_of_progress_are_some_seconds_apart(monkeypatch):
    now, written = [0.0], io.StringIO()
    monkeypatch.setattr("fastgeo.app.cli.time.monotonic", lambda: now[0])
    lines = _Lines(written)
    for now[0] in range(25):
        lines.write(f"\rtrain: {now[0]} of 25")
    lines.write("\n")
    for text in ("\r          \r", "a warning", "\n", "\roptimize: 1 of 1", "\n"):
        lines.write(text)
    assert written.getvalue().splitlines() == [
        *("train: 0 of 25", "train: 10 of 25", "train: 20 of 25", "train: 24 of 25"),
        *("a warning", "optimize: 1 of 1"),
    ]


def test_warnings_are_sentences():
    main(["run", "--out", "r", *SMALL, "--quiet"])
    command = [sys.executable, "-m", "fastgeo", "optimize", "r", "--overwrite", "--quiet"]
    said = subprocess.run(
        [*command, "--method", "geodesic", "--lr", "5", "--steps", "12"],
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = said.stderr.splitlines()
    assert line.startswith("fastgeo: warning: the energy did not fall")


def test_nobody_reads_what_it_says():
    command = f"{sys.executable} -m fastgeo run --help"
    process = subprocess.run(
        ["bash", "-c", f"{command} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert process.stdout == "141\n" and process.stderr == ""


def test_plot_draws_again(run):
    shutil.copytree(run, "r")
    os.remove("r/path_loss.png")
    open("r/report.md", "w").close()
    main(["plot", "r"])
    for name in ("path_loss.png", "report.md"):
        assert FilePath("r", name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("form, start", [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_figures_are_drawn_in_other_formats_beside_the_png(run, form, start):
    shutil.copytree(run, "r")
    main(["plot", "r", "--format", form, "--title", "of mine", "--dpi", "100"])
    for name in ("path_loss", "path_length"):
        assert FilePath("r", f"{name}.{form}").read_bytes().startswith(start)
        assert width("r", name) == 340 and width(run, name) == 1020  # of 3.4 inches
    if form == "svg":
        titled = FilePath("r/path_loss.svg").read_text()
        assert "of mine" in titled and "resnet8" not in titled
    main(["plot", "r"])
    assert set(os.listdir("r")) == FILES and width("r", "path_loss") == 1020


def width(folder, figure):
    """Pixels, of which a PNG's header tells."""
    return int.from_bytes(FilePath(folder, f"{figure}.png").read_bytes()[16:20], "big")


def test_a_run_draws_as_it_is_told():
    main(["run", "--out", "r", *SMALL, "--format", "pdf", "--title", "", "--dpi", "50"])
    assert set(os.listdir("r")) == FILES | {"path_loss.pdf", "path_length.pdf"}
    assert width("r", "path_loss") == 170


@pytest.mark.parametrize(
    "argv, words",
    [
        (["plot", "r", "--dpi", "0"], "dpi must be within 10..2400, got 0"),
        (["compare", "r", "--dpi", "0"], "dpi must be within 10..2400, got 0"),
        (["compare", "r", "--figure", "x.xyz"], "--figure must end with .png, .pdf or .svg, got x"),
    ],
)
def test_figures_that_cannot_be_drawn_are_refused(capsys, argv, words):
    assert words in refused(capsys, *argv)


def test_runs_are_compared(run, capsys):
    shutil.copytree(run, "first")
    shutil.copytree(run, "second")
    main(["optimize", "second", "--overwrite", "--steps", "9"])
    main(["evaluate", "second"])
    capsys.readouterr()
    main(["compare", "first", "second", "--figure", "both.png"])
    said = capsys.readouterr().out
    expected = fastgeo.compare(["first", "second"])
    assert str(expected.table()) in said and said.endswith("both.png\n")
    assert "first" in said and "second" in said and "Bezier" not in said
    assert FilePath("both.png").read_bytes().startswith(b"\x89PNG") and width(".", "both") == 1020
    main(["compare", "first", "second", "--figure", "both.svg", "--title", "of mine"])
    assert "of mine" in FilePath("both.svg").read_text()
    assert "cannot read third/report.json" in refused(capsys, "compare", "first", "third")


def test_a_module_is_made_once_for_all_that_needs_no_weights_of_its_own(monkeypatch):
    made, real = [], Given.new_module
    monkeypatch.setattr(Given, "new_module", lambda given: made.append(1) or real(given))
    main(["run", "--out", "r", *SMALL])
    assert len(made) == 3  # the two that are trained, and one


def test_later_stages_take_the_matched_end_from_its_file(run, capsys):
    shutil.copytree(run, "r")
    os.remove("r/matched.safetensors")
    assert "cannot read r/matched.safetensors" in refused(capsys, "optimize", "r", "--overwrite")
    main(["match", "r", "--overwrite"])
    main(["optimize", "r"])
    assert FilePath("r/path.safetensors").read_bytes() == (run / "path.safetensors").read_bytes()


def test_an_end_of_an_earlier_run_is_taken_by_its_letter(run, capsys):
    given = [f"{run}/ends.safetensors#{letter}" for letter in "ba"]
    options = ["--a", given[0], "--b", given[1], *SMALL[:6]]
    main(["train", "--out", "r", *options])
    there, here = (read_tensors(f / "ends.safetensors", "ends") for f in (run, FilePath("r")))
    torch.testing.assert_close(here["a"], there["b"], rtol=0, atol=0)
    torch.testing.assert_close(here["b"], there["a"], rtol=0, atol=0)
    options[1] = f"{run}/ends.safetensors"
    both = f"holds several networks; name one of them: {options[1]}#a or {options[1]}#b"
    assert both in refused(capsys, "train", "--out", "s", *options)
    options[1] = f"{run}/ends.safetensors#z"
    assert "ends.safetensors#z: there is no z in that file" in refused(
        capsys, "train", "--out", "s", *options
    )


def test_steps_are_logged_as_csv_too():
    main(["run", "--out", "r", *SMALL, "--log", "csv"])
    for log, columns in (
        ("metrics", ["step", "energy", "sqrt_jsd", "euclidean", "points"]),
        ("training", ["step", "loss/a", "loss/b", "lr"]),
    ):
        lines = [json.loads(line) for line in open(f"r/{log}.jsonl")]
        with open(f"r/{log}.csv", newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert list(rows[0]) == columns and len(rows) == len(lines)
        assert [int(row["step"]) for row in rows] == [line["step"] for line in lines]
    assert float(rows[-1]["loss/b"]) == lines[-1]["loss"][1]
    main(["optimize", "r", "--overwrite"])
    assert not os.path.exists("r/metrics.csv")


def test_steps_are_logged_for_tensorboard_too():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main(["run", "--out", "r", *SMALL, "--log", "tensorboard"])
    for stage, log, tag, value in (
        ("train", "training", "loss/b", lambda line: line["loss"][1]),
        ("optimize", "metrics", "energy", lambda line: line["energy"]),
    ):
        lines = [json.loads(line) for line in open(f"r/{log}.jsonl")]
        events = EventAccumulator(f"r/tensorboard/{stage}").Reload().Scalars(tag)
        assert [event.step for event in events] == [line["step"] for line in lines]
        assert [event.value for event in events] == pytest.approx(list(map(value, lines)))


def test_a_log_that_cannot_be_written_is_refused_before_anything_is_replaced(
    run, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = refused(capsys, "optimize", run, "--overwrite", "--log", "tensorboard")
    assert "--log tensorboard needs a package: pip install tensorboard" in words
    assert (run / "path.safetensors").exists()


def test_a_busy_machine_is_said(capsys, monkeypatch):
    monkeypatch.setattr("os.getloadavg", lambda: (64.0, 1.0, 1.0))
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    main(["train", "--out", "r", *SMALL[:6], *SMALL[12:]])
    assert "cores busy; OMP_NUM_THREADS=1 may be faster than 2 threads" in capsys.readouterr().out


def test_help_names_every_command_and_the_defaults_of_the_preset(capsys):
    for argv, words in (
        (["--help"], ["run", "train", "match", "optimize", "evaluate", "plot"]),
        (["run", "--help"], ["--preset", "--points", "(default: resnet8)"]),
        (["run", "--preset", "paper", "--help"], ["resnet20", "3920", "cifar10", "(default: 4"]),
        (["match", "--help"], ["--match-sweeps"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        assert stopped.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words), argv


def test_the_paper_preset_is_the_papers_experiment():
    c = PRESETS["paper"]
    ends, path, training = c.ends, c.path, c.training
    assert (c.data.data, ends.model, ends.width, ends.norm) == ("cifar10", "resnet20", 4, "group")
    assert (path.points, path.steps, path.batch_size, path.spacing) == (25, 3920, 256, "even")
    assert (training.epochs, training.train_batch_size, training.train_lr) == (100, 128, 0.1)
    assert (ends.seed_a, ends.seed_b) == (0, 1)
    assert c.descent == Descent(0.1, 0.0, "constant", precondition=False, coarse_to_fine=False)
    assert PRESETS["digits"].descent == Descent(0.1, 0.9, "linear", True, True)
    assert c.forward.precision == "fp32"
    fast = PRESETS["paper-fast"]
    assert (fast.path.steps, fast.descent) == (path.steps // 10, Descent())
    assert {fast.forward_of(stage).precision for stage in ("train", "optimize")} == {"bf16"}
    same = dict(steps=path.steps, precision="fp32", train_precision="tf32", **vars(c.descent))
    assert fast.changed(**same) == c


def test_every_preset_names_the_engine_with_which_a_run_repeats_itself():
    assert {config.forward.engine for config in PRESETS.values()} == {"stacked"}


def test_settings_are_told_apart_by_their_names_alone():
    config = PRESETS["paper-small"].changed(memory_budget="8GiB", cuda_graph=False, a="a", b="b")
    assert Config.of(json.loads(json.dumps(config.settings))) == config
    assert len(config.settings) == 1 + sum(
        len(vars(group)) for group in vars(config).values() if not isinstance(group, str)
    )
    assert config.forward.memory_budget == "8GiB" and config.path.cuda_graph is False
    bf16 = config.changed(precision="bf16", eval_precision="fp32")
    for stage, precision in (("train", "tf32"), ("optimize", "bf16"), ("evaluate", "fp32")):
        forward = bf16.forward_of(stage)
        budget = "8GiB" if stage == "optimize" else None
        assert (forward.precision, forward.memory_budget) == (precision, budget)
        assert forward.engine == "stacked"
    with pytest.raises(TypeError, match="there is no setting 'colour'"):
        config.changed(colour="red")


def test_config_json_says_where_every_setting_is_from(run):
    content = json.loads((run / "config.json").read_text())
    assert content["about"].keys() == content["config"].keys()
    assert content["about"]["train_lr"] == "peak of the one-cycle rate (paper)"
    row = (
        "| `points` | `5` | N, the number of networks on the path, both ends included (paper: 25) |"
    )
    assert row in (run / "report.md").read_text()


def test_matched_end_computes_what_b_computes(run):
    opened = Run.open(run)
    _, b = opened.ends
    path, module = Path.load(run / "path.safetensors"), opened.given.new_module()
    x = torch.randn(9, 1, 8, 8)
    assert not torch.equal(path.end["conv1.weight"], b["conv1.weight"])
    plain = safetensors.torch.load_file(run / "matched.safetensors")
    module.load_state_dict(plain)
    torch.testing.assert_close(plain, path.end, rtol=0, atol=0)
    torch.testing.assert_close(
        functional_call(module, path.end, (x,)), functional_call(module, b, (x,))
    )
