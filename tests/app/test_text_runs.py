"""The command line on text: runs with our own decoder and with one of transformers."""

import json
import os
import re
import sys
from pathlib import Path as FilePath

import pytest
import torch
import torch.nn.functional as F
from commands import refused

from fastgeo import Path, models
from fastgeo.app.cli import main
from fastgeo.app.config import PRESETS
from fastgeo.app.folder import Run

CODE = """
import transformers

def words(text):
    known = {word: i for i, word in enumerate(sorted(set(text.split())))}
    return [known[word] for word in text.split()], len(known)

def fails(text):
    raise KeyError("here")

def gpt2():
    size = dict(vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)
"""
LINES = [f"line {i} of a text that is {i * i} times as long. " for i in range(40)]
TRAIN = [
    *("--preset", "text", "--block-size", "16", "--train-subset", "60", "--width", "0.125"),
    *("--depth", "1", "--epochs", "2", "--out", "r"),
]
SMALL = [*TRAIN, "--points", "3", "--steps", "2"]


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[1:])
    monkeypatch.delitem(sys.modules, "mytext", raising=False)
    (tmp_path / "mytext.py").write_text(CODE)
    (tmp_path / "a.txt").write_text("".join(LINES))
    yield
    sys.modules.pop("mytext", None)


@pytest.mark.parametrize("norm", ["channel", "rms"])
def test_a_run_on_text_is_reported_a_token(tmp_path, capsys, norm):
    main(["run", *SMALL, "--data", "text:a.txt", "--norm", norm])
    assert "Losses are those of a token." in capsys.readouterr().out
    report, text = json.loads(open("r/report.json").read()), open("r/report.md").read()
    assert report["config"]["data"] == f"text:{tmp_path / 'a.txt'}"
    assert "highest loss, nats a token" in text and "Lengths, on the training text" in text
    assert "gpt of 1 block and width 0.125" in text
    assert "a batch of 32 blocks of 16 tokens" in text and "| `tokens` |" in text
    assert "`augment`" not in text
    content = "".join(LINES)
    characters = sorted(set(content))
    tokens = torch.tensor([characters.index(c) for c in content])[int(0.95 * len(content)) :]
    kind = "rms" if norm == "rms" else "layer"
    module = models.gpt(len(characters), 16, 1, 0.125, norm=kind)
    path = Path.load("r/path.safetensors")
    for i, loss in enumerate(report["paths"]["geodesic"]["test"]["loss"]):
        module.load_state_dict(path[i])
        blocks = list(zip(tokens[:-1].split(16), tokens[1:].split(16), strict=True))
        assert len(blocks[-1][0]) < 16  # which is padded there
        losses = [F.cross_entropy(module(x[None])[0], y, reduction="sum") for x, y in blocks]
        assert sum(losses).item() / (len(tokens) - 1) == pytest.approx(loss, rel=1e-4)


def test_text_that_changes_is_noticed(capsys):
    os.mkdir("texts")
    for i in range(2):
        FilePath(f"texts/{i}.txt").write_text("".join(LINES))
    main(["train", *TRAIN, "--data", "text:texts"])
    main(["match", "r"])
    FilePath("texts/1.txt").write_text("another line. " * 200)
    assert "texts has changed since r was begun" in refused(capsys, "optimize", "r")


def test_a_run_with_a_network_of_transformers(tmp_path):
    options = ["--model", "mytext:gpt2", "--tokens", "bytes", "--data", "text:a.txt"]
    main(["run", *SMALL, *options])
    report = json.loads(open("r/report.json").read())
    assert report["matching"]["relative_change"] < 1e-10
    assert report["paths"]["linear"]["test"]["loss"][0] < 6


def test_a_tokenizer_of_ones_own_gives_the_vocabulary():
    main(["train", *TRAIN, "--data", "text:a.txt", "--block-size", "4", "--tokens", "mytext:words"])
    words = {word for line in LINES for word in line.split()}
    assert len(Run.open(FilePath("r")).ends[0]["tokens.weight"]) == len(words)


def test_the_preset_reads_the_standard_library():
    config = PRESETS["text"]
    run = Run(FilePath("r"), config)
    assert len(run.given.data_files) > 40 and config.data.file is None
    assert run.given.module.head.out_features == run.given.dataset.num_classes


@pytest.mark.parametrize(
    "options, words",
    [
        (["--data", "text:none.txt"], "none.txt: there is no such file"),
        (["--model", "resnet8"], "model resnet8 is for the data sets of images"),
        (["--data", "digits"], "model gpt is for text; for other data"),
        (["--model", "gpt4"], "resnet20, ..., mlp or gpt, or a function"),
        (["--tokens", "mytext:fails"], "tokens mytext:fails cannot be used: KeyError: 'here'"),
        (["--tokens", "words"], "tokens must be characters, bytes or a function, got 'words'"),
        (["--block-size", "0"], "block-size must be at least 1, got 0"),
        (["--batch-size", "61"], "batch-size 61 is larger than the data set: 60 training blocks"),
        (["--depth", "0"], "depth must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(capsys, options, words):
    assert re.search(words, refused(capsys, "run", *SMALL, "--data", "text:a.txt", *options))
    assert not os.path.exists("r")
