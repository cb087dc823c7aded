"""The command line with a user's own network, data and weights."""

import json
import os
import re
import sys
from pathlib import Path as FilePath

import pytest
import safetensors.torch
import torch
from commands import SMALL, refused
from torch import nn

from fastgeo import Path, permutation_spec
from fastgeo.app.cli import main
from fastgeo.store.files import read_tensors

MODULE = '''
import torch
from torch import nn

class Masked(nn.Module):
    """Two named inputs, tied weights, a buffer, dropout, logits at every position."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.drop = nn.Dropout(0.1)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(6))

    def forward(self, tokens, mask):
        x = self.embed(tokens) * mask[..., None] * self.scale
        return self.head(self.drop(x + self.mix(x.cumsum(1)).tanh()))

class Set(torch.utils.data.Dataset):
    def __init__(self, count):
        tokens = torch.arange(5).repeat(count, 1) + torch.arange(count)[:, None]
        self.tokens = tokens % 7

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"mask": torch.ones(5), "tokens": self.tokens[i]}, (self.tokens[i] + 1) % 7

def loaders():
    make = torch.utils.data.DataLoader
    return make(Set(40), batch_size=8, shuffle=True), make(Set(10), batch_size=8)

def small():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def deep():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10)
    )

def narrow():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))

class pair(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, x):
        return "scores", super().forward(x.flatten(1)).tolist()

def normalised():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

def images():
    x = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 10
    return list(zip(x.split(20), y.split(20))), [(x, y)]

def shuffled():
    (train, labels), = images()[1]
    pairs = torch.utils.data.TensorDataset(train, labels)
    return torch.utils.data.DataLoader(pairs, batch_size=20, shuffle=True), images()[1]

def fails():
    raise KeyError("here")

once = lambda: (iter([]), [])
empty = lambda: ([], [])
three = lambda: (1, 2, 3)
triples = lambda: ([(1, 2, 3)], [(1, 2, 3)])
nothing = lambda: None
number = 3
'''


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """A module of the user's in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[1:])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "code.py").write_text(MODULE)
    for name in ("mine", "mine.code"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield
    for name in ("mine", "mine.code"):
        sys.modules.pop(name, None)


MASKED = ["--model", "mine.code:Masked", "--data", "mine.code:loaders"]
SHORT = ["--epochs", "3", "--points", "4", "--steps", "3"]


def test_a_run_with_an_own_network_and_own_data():
    main(["run", "--out", "r", *MASKED, *SHORT, "--engine", "auto"])
    report = json.loads(open("r/report.json").read())
    assert len(report["paths"]["bezier"]["test"]["loss"]) == 4
    assert report["matching"]["relative_change"] < 1e-10
    assert set(report["engines"]) == {"train", "optimize", "evaluate"}
    assert report["engines"]["train"]["seconds"]  # 15 steps: measured
    text = open("r/report.md").read()
    assert (
        "(mine.code:Masked, trained with the seeds 14 and 15) are joined on mine.code:loaders"
        in text
    )
    assert "| train | " in text and "a batch of the loader, the first of which has 8" in text
    path = Path.load("r/path.safetensors")
    assert torch.equal(path.interior["embed.weight"], path.interior["head.weight"])
    steps = [json.loads(line) for line in open("r/training.jsonl")]
    assert len(steps) == 15 and sum(steps[-1]["loss"]) < sum(steps[0]["loss"]) / 2
    main(["optimize", "r", "--overwrite", "--chunk", "1"])
    main(["evaluate", "r"])
    main(["plot", "r"])


def test_matching_two_checkpoints_of_an_own_network(capsys):
    """A permuted copy is brought back, as a plain state dict, with a report to read."""
    sys.path.insert(0, "")
    from mine.code import deep

    torch.manual_seed(0)
    a = deep()
    spec = permutation_spec(a, torch.zeros(2, 1, 8, 8))
    torch.save(a.state_dict(), "a.pt")
    safetensors.torch.save_file(spec.permute(a.state_dict(), spec.random()), "b.safetensors")
    given = ["--model", "mine.code:deep", "--data", "mine.code:images"]
    main(["train", "--out", "r", *given, "--a", "a.pt", "--b", "b.safetensors"])
    main(["match", "r"])
    assert "r/matching.md, r/matched.safetensors; next: fastgeo optimize r" in (
        capsys.readouterr().out
    )
    b = deep()
    b.load_state_dict(safetensors.torch.load_file("r/matched.safetensors"))
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=0, atol=0)
    text = open("r/matching.md").read()
    for words in (
        "mine.code:deep, with the weights ",
        "The inner product of the two ends' parameters was ",
        "Sequential: 2 permutations",
        "1.weight[0]: 12 positions",
        "1.weight[1]: it is the network's input",
    ):
        assert words in text, words


def test_each_network_draws_its_own_batches_from_a_shared_loader():
    """The second of three networks is the first of two."""
    options = ["--model", "mine.code:small", "--data", "mine.code:shuffled", "--epochs", "2"]
    options += ["--engine", "loop"]
    main(["train", "--out", "3", *options, "--seed-a", "1", "--seed-b", "2", "--count", "3"])
    main(["train", "--out", "2", *options, "--seed-a", "2", "--seed-b", "3"])
    three, two = (read_tensors(FilePath(f"{k}/ends.safetensors"), "ends") for k in "32")
    assert list(three) == ["a", "b", "c"] and list(two) == ["a", "b"]
    torch.testing.assert_close(three["b"], two["a"], rtol=0, atol=0)
    torch.testing.assert_close(three["c"], two["b"], rtol=0, atol=0)
    assert not torch.equal(three["a"]["1.weight"], three["b"]["1.weight"])


def test_dropout_repeats_itself_with_the_seed():
    for name in ("1", "2"):
        torch.manual_seed(int(name))
        main(["train", "--out", name, *MASKED, "--epochs", "1", "--engine", "stacked"])
    first, second = (open(f"{name}/ends.safetensors", "rb").read() for name in "12")
    assert first == second


def test_an_engine_once_chosen_is_kept_when_a_stage_is_done_again(capsys):
    main(["run", "--out", "r", *SMALL, "--steps", "15", "--engine", "auto"])
    said = capsys.readouterr().out
    before = json.loads(open("r/config.json").read())["engines"]
    assert f"optimize: engine {before['optimize']['engine']}" in said
    at_once = before["evaluate"]["chunk"]
    assert not at_once or f"{at_once} at a time was chosen (" in said
    assert before["optimize"]["seconds"] and before["optimize"]["device"] == "cpu"
    first = open("r/path.safetensors", "rb").read()
    main(["optimize", "r", "--overwrite"])
    assert "optimize: engine" not in capsys.readouterr().out
    assert json.loads(open("r/config.json").read())["engines"]["optimize"] == before["optimize"]
    assert len(first) == os.path.getsize("r/path.safetensors")
    main(["optimize", "r", "--overwrite", "--engine", "loop"])
    assert json.loads(open("r/config.json").read())["engines"]["optimize"]["engine"] == "loop"


def test_a_memory_budget_reaches_the_optimisation(capsys):
    main(["run", "--out", "r", *SMALL, "--memory-budget", "1100kB"])
    config = json.loads(open("r/config.json").read())
    assert config["engines"]["optimize"]["chunk"] == 1
    words = refused(capsys, "optimize", "r", "--overwrite", "--memory-budget", "1kB")
    assert "memory-budget" in words and "too small" in words


def test_batch_norm_is_refused_or_recalibrated(capsys):
    options = ["--model", "mine.code:normalised", *SMALL]
    sentence = refused(capsys, "run", "--out", "r", *options)
    assert "layer 2 is BatchNorm" in sentence and "anew with --batchnorm recalibrate" in sentence
    main(["run", "--out", "r", *options, "--batchnorm", "recalibrate"])
    path = Path.load("r/path.safetensors")
    tracked = path.interior["2.running_mean"]
    line = torch.lerp(path.start["2.running_mean"], path.end["2.running_mean"], 0.5)
    assert not torch.allclose(tracked[1], line)  # of five points the middle one


@pytest.fixture
def weights():
    """Two states of the network `small` under every form that is read."""
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2)]
    states = [net.state_dict() for net in nets]
    safetensors.torch.save_file(states[0], "a.safetensors")
    torch.save(states[1], "b.pt")
    torch.save({"state_dict": states[1], "epoch": 3}, "nested.pt")
    torch.save({"model": {f"module.{k}": v for k, v in states[1].items()}}, "parallel.pth")
    torch.save(nets[1], "pickled.pt")
    torch.save({"1.weight": torch.zeros(10, 63), "1.bias": torch.zeros(10)}, "shape.pt")
    torch.save({"1.weight": torch.zeros(10, 64)}, "less.pt")
    torch.save({**states[1], "more": torch.zeros(1)}, "more.pt")
    torch.save([1, 2], "list.pt")
    with open("damaged.pt", "wb") as stream:
        stream.write(b"no archive")
    return states


GIVEN = ["--model", "mine.code:small", "--data", "mine.code:images"]


@pytest.mark.parametrize("b", ["b.pt", "nested.pt", "parallel.pth"])
def test_ends_are_read_from_files(weights, b):
    main(["run", "--out", "r", *GIVEN, "--a", "a.safetensors", "--b", b, *SHORT[2:]])
    path = Path.load("r/path.safetensors")
    torch.testing.assert_close(path.start, weights[0], rtol=0, atol=0)
    torch.testing.assert_close(path.end, weights[1], rtol=0, atol=0)
    config = json.loads(open("r/config.json").read())
    assert config["stages"]["train"]["b"] == os.path.abspath(b) == config["config"]["b"]
    assert not os.path.exists("r/training.jsonl")
    text = open("r/report.md").read()
    assert "a.safetensors and" in text and "`seed_a`" not in text and "`epochs`" not in text


@pytest.mark.parametrize(
    "file, words",
    [
        ("missing.pt", "cannot read .*missing.pt: there is no such file"),
        ("damaged.pt", "cannot read .*damaged.pt"),
        ("pickled.pt", "pickled.pt: it holds more than tensors, which could run code; save"),
        ("list.pt", "holds no state dict"),
        ("shape.pt", r"1.weight has shape \[10, 63\] in .*shape.pt and \[10, 64\] in the module"),
        ("less.pt", "less.pt lacks 1.bias"),
        ("more.pt", "more.pt holds more, which the module does not have"),
    ],
)
def test_weights_that_do_not_fit_get_one_sentence(weights, capsys, file, words):
    options = ["--a", "a.safetensors", "--b", file]
    assert re.search(words, refused(capsys, "run", "--out", "r", *GIVEN, *options))
    assert not os.path.exists("r")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--a", "a.safetensors"], "--a and --b go together"),
        (["--a", "a.pt", "--b", "b.pt", "--count", "3"], "--count says how many networks to train"),
        (["--model", "nowhere:net"], "nowhere:net cannot be used: ModuleNotFoundError"),
        (["--model", "mine.code:absent"], "cannot be used: AttributeError"),
        (["--model", "mine.code:number"], "it is of type int and cannot be called"),
        (["--model", "mine.code:fails"], "mine.code:fails cannot be used: KeyError: 'here'"),
        (["--model", "mine.code:nothing"], "must return an nn.Module, got NoneType"),
        (
            ["--data", "mine.code:images"],
            "model resnet8 is for the data sets of images that have a name",
        ),
        (["--data", "mine.code:once"], "can be gone through once only"),
        (["--data", "mine.code:empty"], "the train loader is empty"),
        (["--data", "mine.code:three"], "a tuple (train, test)"),
        ([*GIVEN[:2], "--data", "mine.code:triples"], "must give batches (inputs, labels)"),
        (["--count", "1"], "count must be within 2..26"),
        (["--count", "3", "--seed-a", "16"], "the networks need different seeds: seed-a is 16"),
        (["--chunk", "2", "--memory-budget", "1GB"], "give one of them"),
        (["--memory-budget", "much"], "a memory budget is a size as in 8GiB"),
    ],
)
def test_what_cannot_be_used_gets_one_sentence(capsys, options, words):
    assert words in refused(capsys, "run", "--out", "r", *options)
    assert not os.path.exists("r")


@pytest.mark.parametrize(
    "model, data, words",
    [
        ("small", "loaders", "small cannot be evaluated on inputs of mine.code:loaders: TypeError"),
        ("Masked", "images", "Masked cannot be evaluated on inputs of mine.code:images: TypeError"),
        ("narrow", "images", "data mine.code:images: labels must be within 0..4, or"),
        ("pair", "images", "model mine.code:pair: the module must return logits, one tensor"),
    ],
)
def test_a_network_and_data_that_do_not_fit_each_other_are_named(capsys, model, data, words):
    options = ["--model", f"mine.code:{model}", "--data", f"mine.code:{data}"]
    assert words in refused(capsys, "run", "--out", "r", *options)
    assert not os.path.exists("r")
