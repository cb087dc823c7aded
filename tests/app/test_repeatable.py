"""The same seed on the same machine gives the same result, and a long run does not grow."""

import json

import numpy as np
import pytest

from benchmarks.soak import soak
from fastgeo.app.cli import main
from fastgeo.app.config import PRESETS

EXACT = ("ends.safetensors", "permutation.safetensors", "path.safetensors") + (
    *("training.jsonl", "metrics.jsonl", "path_loss.png"),
)
COLOUR = [
    *("--data", "npz:colour.npz", "--augment", "flip-crop", "--width", "1", "--epochs", "1"),
    *("--train-batch-size", "12", "--batch-size", "12", "--points", "4", "--steps", "2"),
    *("--train-subset", "24"),
]
TEXT = [
    *("--data", "text:words.txt", "--width", "0.125", "--depth", "1", "--block-size", "8"),
    *("--epochs", "1", "--train-batch-size", "12", "--batch-size", "12", "--points", "4"),
    *("--steps", "2", "--train-subset", "24"),
]
SMALL = {"digits": ["--epochs", "2", "--steps", "5"], "text": TEXT}


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("test", 8)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % 4
    np.savez("colour.npz", **arrays)
    words = rng.choice(["one ", "two ", "three "], 400)
    (tmp_path / "words.txt").write_text("".join(words))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_gives_the_same_result_twice(preset, tmp_path):
    """With the preset's network, schedule and engine, and few steps on a CPU."""
    for name in ("first", "second"):
        options = ["--preset", preset, "--device", "cpu", *SMALL.get(preset, COLOUR)]
        main(["run", "--out", name, *options])
    for name in EXACT:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second, name
    reports = [json.loads((tmp_path / f / "report.json").read_text()) for f in ("first", "second")]
    for report in reports:
        del report["seconds"], report["checksum"]
    assert reports[0] == reports[1]


def test_a_long_run_grows_neither_in_memory_nor_in_open_files(tmp_path):
    """The long form is `python -m benchmarks.soak`."""
    config = PRESETS["digits"].changed(
        width=0.25,
        train_subset=100,
        epochs=2,
        points=5,
        batch_size=20,
        steps=300,
    )
    rows = soak(config, tmp_path / "run", every=20)
    settled = rows[4:]  # the first steps fill the allocator's pools
    sizes = [row["resident, MiB"] for row in settled]
    assert len(rows) == 16 and max(sizes) - sizes[0] < 8, sizes
    assert len({row["open files"] for row in settled}) == 1
    assert all(row["states"] <= 2 for row in rows)
