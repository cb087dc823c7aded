"""Transformers joined by the benchmark in small: what is found, kept, and not measured again."""

import math

import pytest

from benchmarks import transformers
from benchmarks.transformers import FOUND, PATHS, Options, Results


def test_a_benchmark_that_was_stopped_goes_on(tmp_path, monkeypatch):
    options = Options(
        pairs=1, cases=("vit",), subset=128, epochs=1, steps=2, seen=16, out=tmp_path / "kept.jsonl"
    )
    taken = transformers.Pair.result

    def stopped(self, name):
        if name == "geodesic":
            raise KeyboardInterrupt
        return taken(self, name)

    monkeypatch.setattr(transformers.Pair, "result", stopped)
    results = Results(options)
    with pytest.raises(KeyboardInterrupt):
        results.measure()
    before = dict(results.known)
    assert {path for _, _, path in before} == {"line", "permutations", "all symmetries"}

    measured = []

    def counted(self, name):
        measured.append(name)
        return taken(self, name)

    monkeypatch.setattr(transformers.Pair, "result", counted)
    monkeypatch.delattr(transformers.Pair, "_trained")  # the ends are kept as well
    results = Results(options)
    results.measure()
    assert measured == ["geodesic", "Bezier"]
    assert before.items() <= results.known.items()
    rows = list(results.rows())
    assert [row["path"] for row in rows] == list(PATHS)
    assert all(math.isfinite(row["of each"][0][key]) for row in rows for key in FOUND)
    length = {row["path"]: row["of each"][0]["Σ‖Δθ‖"] for row in rows}
    assert length["permutations"] < length["line"]
