"""Files of a run that are truncated, emptied, changed in a bit or of another run: never wrong
numbers, always a sentence that names the file and says what to do."""

import os
import random
import shutil
from pathlib import Path as FilePath

import numpy as np
import pytest
from commands import FILES, refused

from fastgeo import Checkpoints, Path
from fastgeo.app.cli import main
from fastgeo.app.folder import Run
from fastgeo.store.checkpoint import Stopped
from fastgeo.store.files import read_json, read_tensors, write_json, write_tensors

SMALL = [
    *("--width", "0.25", "--train-subset", "100", "--epochs", "1", "--points", "3"),
    *("--steps", "3", "--batch-size", "50", "--train-batch-size", "50"),
]
TIMES = 300


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of two runs that differ in their seeds."""
    folders = [tmp_path_factory.mktemp("runs") / name for name in "ab"]
    for folder, seed in zip(folders, ("4", "6"), strict=True):
        main(["run", "--out", str(folder), *SMALL, "--seed-a", seed])
    return folders


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mutations(content, other, seed):
    """The bytes of a file emptied, truncated, of another run, with changed bits and bytes."""
    draw = random.Random(seed)
    yield b""
    yield other
    for _ in range(TIMES):
        changed = bytearray(content)
        kind = draw.randrange(4)
        if kind == 0:
            changed = changed[: draw.randrange(len(content))]
        elif kind == 1:
            changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == 2:
            start = draw.randrange(len(content))
            changed[start : start + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))
        else:
            at = [draw.randrange(len(content)) for _ in range(8)]
            for position in at:
                changed[position] = draw.randrange(256)
        yield bytes(changed)


def plain(tensors):
    return {
        group: {name: (str(t.dtype), t.tolist()) for name, t in named.items()}
        for group, named in tensors.items()
    }


def parts(folder):
    return plain(Path.load(FilePath(folder) / "path.safetensors")._parts())


READERS = {
    "config.json": lambda folder: vars(Run.open(folder))["config"],
    "report.json": lambda folder: read_json(folder / "report.json"),
    "path.safetensors": parts,
    "ends.safetensors": lambda folder: plain(read_tensors(folder / "ends.safetensors", "ends")),
    "permutation.safetensors": lambda folder: plain(
        read_tensors(folder / "permutation.safetensors", "permutation")
    ),
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_no_reader_takes_damage_for_content(runs, name):
    """By the checksum inside each file alone."""
    shutil.copytree(runs[0], "r")
    file, read = FilePath("r") / name, READERS[name]
    content, expected = file.read_bytes(), read(FilePath("r"))
    refusals = 0
    for changed in mutations(content, b"", seed=name):
        file.write_bytes(changed)
        try:
            assert read(FilePath("r")) == expected  # as where white space became other white space
        except ValueError as error:
            assert f"r/{name}" in str(error)
            refusals += 1
    assert refusals > 0.9 * TIMES


@pytest.mark.parametrize("name", sorted(READERS))
def test_a_file_of_a_newer_schema_is_refused_by_its_version(runs, name, monkeypatch):
    shutil.copytree(runs[0], "r")
    file = FilePath("r") / name
    is_json = file.suffix == ".json"
    content = read_json(file) if is_json else read_tensors(file, file.stem)
    with monkeypatch.context() as newer:
        newer.setattr("fastgeo.store.files.SCHEMA", 2)
        write_json(file, content) if is_json else write_tensors(file, file.stem, content)
    with pytest.raises(ValueError, match=f"{name}: it has schema 2, which this fastgeo does not"):
        READERS[name](FilePath("r"))


def test_going_on_with_data_that_changed_is_refused(capsys):
    def save(seed):
        draw = np.random.default_rng(seed)
        arrays = {
            f"x_{s}": draw.integers(0, 256, (120, 8, 8, 1), np.uint8) for s in ("train", "test")
        }
        np.savez("data.npz", **arrays, y_train=np.arange(120) % 3, y_test=np.arange(120) % 3)

    save(0)
    with pytest.raises(SystemExit) as stop:
        main(["run", "--out", "r", *SMALL, "--data", "npz:data.npz", "--max-minutes", "1e-9"])
    assert stop.value.code == 75
    save(1)
    sentence = refused(capsys, "run", "--out", "r", "--resume")
    assert "data.npz has changed since r was begun; restore it" in sentence
    save(0)
    main(["run", "--out", "r", "--resume"])
    save(1)
    assert "has changed since" in refused(capsys, "optimize", "r", "--overwrite")


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_run_goes_on_from_no_damaged_file(runs, name):
    """By the checksums in config.json, which going on compares, too."""
    shutil.copytree(runs[0], "r")
    file, settings = FilePath("r") / name, Run.open(runs[0]).config
    other = (runs[1] / name).read_bytes()
    content, refusals = file.read_bytes(), 0
    for changed in mutations(content, other, seed=name):
        file.write_bytes(changed)
        try:
            run = Run.open(FilePath("r"))
            run.verify([name for stage in run.stages for name in run.stages[stage]["files"]])
            same = name == "config.json" and run.config == settings
            assert same or changed == content
        except ValueError as error:
            # With the config.json of another run, its files are the others.
            assert f"r/{name}" in str(error) or changed == other
            refusals += 1
    assert refusals > 0.9 * TIMES


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_command_line_names_a_damaged_file_and_what_to_do(runs, name, capsys):
    again = {"ends": "train --out r", "training": "train --out r", "permutation": "match r"}
    again |= {"path": "optimize r", "metrics": "optimize r", "report": "evaluate r"}
    again |= {"path_loss": "plot r", "path_length": "plot r"}
    again |= {"matched": "match r", "matching": "match r"}
    stage = "plot r" if name == "report.md" else again.get(name.split(".")[0])
    advice = f"make it again with: fastgeo {stage} --overwrite"
    if name == "config.json":
        advice = "restore a copy of it, or begin anew in another folder"
    shutil.copytree(runs[0], "r")
    file = FilePath("r") / name
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for changed in (b"", content[: len(content) // 2], bytes(flipped), None):
        file.unlink() if changed is None else file.write_bytes(changed)
        if changed is None and name == "config.json":
            advice = "holds no run"
        sentence = refused(capsys, "run", "--out", "r", "--resume")
        assert advice in sentence and f"r/{name}" in sentence or advice == "holds no run"
    file.write_bytes((runs[1] / name).read_bytes())
    refused(capsys, "run", "--out", "r", "--resume")


def test_stages_refuse_what_the_stage_before_did_not_leave(runs, capsys):
    shutil.copytree(runs[0], "r")
    shutil.copy(runs[1] / "ends.safetensors", "r")
    for command in ("match", "optimize", "evaluate", "plot"):
        sentence = refused(capsys, command, "r", "--overwrite")
        assert "cannot read r/ends.safetensors: it is not as train left it here" in sentence
        assert "make it again with: fastgeo train --out r --overwrite" in sentence
    shutil.rmtree("r")
    shutil.copytree(runs[0], "r")
    with open("r/metrics.jsonl", "a") as stream:
        stream.write("\n")
    assert "cannot read r/metrics.jsonl" in refused(capsys, "plot", "r", "--overwrite")


def test_a_report_is_tied_to_the_weights_that_it_is_about(runs, capsys):
    """Also where the report of another run comes with its line in config.json."""
    shutil.copytree(runs[0], "r")
    shutil.copy(runs[1] / "report.json", "r")
    run, other = Run.open(FilePath("r")), Run.open(runs[1])
    run.stages["evaluate"] = other.stages["evaluate"]
    run.save_config()
    sentence = refused(capsys, "plot", "r", "--overwrite")
    assert "r/report.json is about another ends.safetensors; make it again with:" in sentence
    report = read_json(FilePath("r/report.json"))
    assert set(report["files"]) == {"ends.safetensors", "permutation.safetensors"} | {
        "path.safetensors"
    }


@pytest.fixture(scope="module")
def stopped(runs, tmp_path_factory):
    """A run that was stopped before a step of its optimisation, and its state."""
    folder = tmp_path_factory.mktemp("stopped") / "r"
    shutil.copytree(runs[0], folder)
    with pytest.raises(SystemExit) as stop:
        main(["optimize", str(folder), "--overwrite", "--max-minutes", "1e-9"])
    assert stop.value.code == 75
    return folder


def test_a_stopped_run_goes_on_from_an_intact_state_only(stopped, runs, capsys):
    shutil.copytree(stopped, "r")
    (state,) = FilePath("r/checkpoint").iterdir()
    run = Run.open(FilePath("r"))
    expected = run.checkpoints("optimize", "metrics.jsonl").load("optimize")
    for file in sorted(state.iterdir()):
        content, refusals = file.read_bytes(), 0
        for changed in mutations(content, b"{}", seed=file.name):
            file.write_bytes(changed)
            try:
                found = run.checkpoints("optimize", "metrics.jsonl").load("optimize")
                assert found.step == expected.step and found.values == expected.values
                assert {k: plain(v) for k, v in found.tensors.items()} == {
                    k: plain(v) for k, v in expected.tensors.items()
                }
            except ValueError as error:
                assert "remove r/checkpoint to start it anew" in str(error)
                refusals += 1
        assert refusals > 0.9 * TIMES, file
        sentence = refused(capsys, "optimize", "r", "--resume")
        assert f"r/checkpoint/{state.name}/" in sentence and "start it anew" in sentence
        file.write_bytes(content)
    main(["run", "--out", "r", "--resume"])
    for name in ("path.safetensors", "metrics.jsonl", "path_loss.png"):
        assert (FilePath("r") / name).read_bytes() == (runs[0] / name).read_bytes()


def test_the_state_of_another_run_is_refused(stopped, runs, capsys):
    shutil.copytree(runs[1], "other")
    with pytest.raises(SystemExit):
        main(["optimize", "other", "--overwrite", "--max-minutes", "1e-9"])
    shutil.rmtree("other/checkpoint")
    shutil.copytree(stopped / "checkpoint", "other/checkpoint")
    sentence = refused(capsys, "optimize", "other", "--resume")
    assert "belongs to another run: seed-a is 4 there and 6 here" in sentence


def test_a_stage_that_was_begun_is_not_begun_anew_unasked(stopped, capsys):
    shutil.copytree(stopped, "r")
    sentence = refused(capsys, "optimize", "r")
    assert "holds the state of an unfinished optimize; give --resume to go on from" in sentence
    assert "--lr is 0.2 in r, not 0.3, and --resume goes on with" in refused(
        capsys, "optimize", "r", "--resume", "--lr", "0.3"
    )
    assert "give one of them" in refused(capsys, "optimize", "r", "--resume", "--overwrite")
    main(["optimize", "r", "--overwrite", "--lr", "0.2"])
    assert not os.path.exists("r/checkpoint")


def test_going_on_takes_the_runs_settings_and_refuses_others(runs, capsys):
    shutil.copytree(runs[0], "r")
    main(["run", "--out", "r", "--resume", "--points", "3"])
    assert "--points is 3 in r, not 4, and --resume" in refused(
        capsys, "run", "--out", "r", "--resume", "--points", "4"
    )
    # A preset that is named stands for all of its settings.
    sentence = refused(capsys, "run", "--preset", "digits", "--out", "r", "--resume")
    assert "in r, not" in sentence
    same = [*SMALL, "--seed-a", "4"]
    main(["run", "--preset", "digits", "--out", "r", "--resume", *same])
    main(["run", "--out", "new", "--resume", *same])  # starts it
    assert (FilePath("new") / "path.safetensors").read_bytes() == (
        runs[0] / "path.safetensors"
    ).read_bytes()
    assert "max-minutes must be positive" in refused(
        capsys, "run", "--out", "x", "--max-minutes", "0"
    )


def test_what_a_killed_process_may_leave_is_no_hindrance(runs):
    os.mkdir("r")
    for name in (".config.json.part", ".lock"):
        (FilePath("r") / name).touch()
    main(["run", "--out", "r", *SMALL])
    assert set(os.listdir("r")) == FILES


def test_an_evaluation_goes_on_at_the_path_it_was_at(runs, monkeypatch, capsys):
    from fastgeo.app import stages as pipeline

    shutil.copytree(runs[0], "r")
    before = read_json(FilePath("r/report.json"))["paths"]
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "r", "--overwrite", "--max-minutes", "1e-9"])
    assert stop.value.code == 75 and os.listdir("r/checkpoint") == ["evaluate-000000001"]
    evaluated, real = [], pipeline.evaluate
    monkeypatch.setattr(
        pipeline, "evaluate", lambda *a, **k: evaluated.append(k["description"]) or real(*a, **k)
    )
    main(["evaluate", "r", "--resume"])
    assert evaluated == ["evaluate matched", "evaluate bezier"]
    assert read_json(FilePath("r/report.json"))["paths"] == before
    main(["evaluate", "r", "--resume"])
    assert "evaluate is finished in r" in capsys.readouterr().out


def test_stopped_is_an_interrupt():
    """Code that handles errors and lets interrupts through lets it through."""
    assert issubclass(Stopped, KeyboardInterrupt) and not issubclass(Stopped, Exception)
    assert Checkpoints("nowhere").load("optimize") is None
