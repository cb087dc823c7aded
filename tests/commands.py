"""The command line as tests call it: a small setting, its files, and what is refused."""

import pytest

from fastgeo.app.cli import main

SMALL = [
    *("--width", "0.25", "--train-subset", "200", "--epochs", "2", "--points", "5"),
    *("--steps", "4", "--batch-size", "50", "--train-batch-size", "20"),
]
WEIGHTS = ("ends.safetensors", "permutation.safetensors", "path.safetensors")
FILES = {
    *WEIGHTS,
    *("config.json", "training.jsonl", "metrics.jsonl", "report.json", "report.md"),
    *("path_loss.png", "path_length.png"),
    *("matched.safetensors", "matching.md"),
}


def refused(capsys, *argv):
    """The one sentence that bad input gets on stderr besides progress bars, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line and "it/s" not in line and "/s]" not in line]
    lines = [line for line in lines if "/s, " not in line]
    assert len(lines) == 1 and lines[0].startswith("fastgeo: ")
    return lines[0]
