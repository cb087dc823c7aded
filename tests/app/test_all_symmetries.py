"""Runs whose ends are matched by all symmetries join both ends in the form that is matched."""

import json
import os
from pathlib import Path as FilePath

import pytest
import safetensors.torch
import torch
from commands import refused

from fastgeo import Path
from fastgeo.app.cli import main
from fastgeo.app.folder import Run

NAMES = ("folded", "matched")
TRAIN = [
    *("--preset", "text", "--data", "text:a.txt", "--block-size", "8", "--train-subset", "64"),
    *("--engine", "stacked", "--width", "0.125", "--depth", "1", "--epochs", "1", "--out", "r"),
    *("--train-batch-size", "16"),
]
ALL = ("--symmetries", "all")


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"line {i} of a text that is {i * i} times as long. " for i in range(40)]
    (tmp_path / "a.txt").write_text("".join(lines))


def test_a_run_joins_the_ends_in_their_common_form(capsys):
    main(["train", *TRAIN])
    main(["match", "r", *ALL])
    main(["optimize", "r", "--points", "3", "--steps", "2", "--batch-size", "16"])
    main(["evaluate", "r"])
    run = Run.open(FilePath("r"))
    folded, matched = (safetensors.torch.load_file(f"r/{n}.safetensors") for n in NAMES)
    assert (folded["blocks.0.norm1.weight"] == 1).all()
    path = Path.load("r/path.safetensors")
    for end, state in ((path.at(0.0), folded), (path.at(1.0), matched)):
        for name, tensor in state.items():
            torch.testing.assert_close(end[name], tensor)
    tokens = run.given.dataset.train[:2, :-1].long()
    for original, state in zip(run.ends, run.matched, strict=True):
        with torch.no_grad():
            was, now = (
                torch.func.functional_call(run.given.module, one, (tokens,))
                for one in (original, state)
            )
        torch.testing.assert_close(now, was, rtol=1e-4, atol=1e-4)
    paths = json.loads(open("r/report.json").read())["paths"]
    ends = [[path["train"]["loss"][i] for i in (0, -1)] for path in paths.values()]
    assert ends == [pytest.approx(ends[0], rel=1e-4)] * 3
    assert paths["linear"]["euclidean"] > paths["matched"]["euclidean"]
    assert "weights of norms folded into what reads them" in open("r/matching.md").read()

    main(["match", "r", "--symmetries", "permutation", "--overwrite"])
    assert not os.path.exists("r/folded.safetensors")
    assert Run.open(FilePath("r")).matched[0].keys() == folded.keys()


def test_a_damaged_end_is_named(capsys):
    main(["train", *TRAIN])
    main(["match", "r", *ALL])
    os.remove("r/folded.safetensors")
    assert "cannot read r/folded.safetensors" in refused(capsys, "optimize", "r")


def test_activations_are_refused(capsys):
    said = refused(capsys, "run", *TRAIN, *ALL, "--match-method", "activations")
    assert "--symmetries all and --match-method activations exclude each other" in said
