"""Memory: what a step takes is known before, and what does not fit is not begun."""

import pytest
import torch
from commands import refused
from conftest import images, plain, tiny_resnet

from benchmarks.memory import compare
from fastgeo import Path, optimize, stack
from fastgeo.app.config import PRESETS
from fastgeo.app.folder import Run
from fastgeo.step.memory import AT_START, StepMemory, activation_bytes, free_bytes, step_memory


def test_free_memory_is_what_the_system_tells():
    free = free_bytes(torch.device("cpu"))
    total = int(open("/proc/meminfo").readline().split()[1]) * 1024
    assert 0 < free < total


@pytest.mark.parametrize(
    "own, files, free",
    [
        ("0::/a/b", {"a/memory.max": "max", "a/b/memory.max": "9000"}, 2500),
        ("4:memory:/c", {"memory/c/memory.limit_in_bytes": "9000"}, 2500),
        ("0::/a", {"a/memory.max": "max"}, 1024 * 8000),
    ],
)
def test_limits_of_control_groups_count(own, files, free, monkeypatch):
    """9,000 bytes of which 7,000 are in use, 500 of them pages of files that can be dropped."""
    stat = {"memory.stat": "anon 6000\ninactive_file 500\ntotal_inactive_file 500\n"}
    texts = {"/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n"}
    texts |= {"/proc/self/cgroup": f"1:cpu:/elsewhere\n{own}\n"}
    for name, text in files.items():
        folder = f"/sys/fs/cgroup/{name.rpartition('/')[0]}"
        texts[f"/sys/fs/cgroup/{name}"] = text
        for used in ("memory.current", "memory.usage_in_bytes"):
            texts[f"{folder}/{used}"] = "7000\n"
        texts |= {f"{folder}/{key}": value for key, value in stat.items()}
    monkeypatch.setattr("fastgeo.step.memory._text", lambda file: texts.get(str(file), ""))
    assert free_bytes(torch.device("cpu")) == free


def test_the_parts_of_a_step_add_up():
    need = StepMemory(weights=1000, activations=100, room=1.5, at_once=True)
    assert need.peak(23) == AT_START + 1000 + 23 * 250
    assert need.peak(23, 4) == AT_START + 1000 + 8 * 100 + 4 * 150
    assert need.peak(2, 1, streamed=False) == AT_START + 1000 + 250
    assert need.fitting(23, need.peak(23, 4)) == 4 and need.fitting(23, AT_START) is None
    loop = StepMemory(weights=0, activations=100, room=1.5, at_once=False)
    assert loop.peak(23) == AT_START + 2300 + 150


def test_activations_are_counted_on_a_few_inputs(module):
    x, params = images(24), {n: t[None] for n, t in module.state_dict().items()}
    for engine in ("stacked", "loop"):
        network = stack(module, engine=engine)
        need = step_memory(network, params, x[:4], networks=5, scale=6)
        assert need.activations == pytest.approx(activation_bytes(network, params, x), rel=0.02)
        assert step_memory(network, params, x[:8], networks=5, scale=3) == need


@pytest.mark.parametrize("setting", ["cifar10 preset at N = 9, B = 32, stacked"])
def test_the_estimate_is_within_30_percent_of_a_measured_peak(setting, monkeypatch):
    """A setting of `python -m benchmarks.memory --estimate`: the median of three processes,
    with as many threads as they like, because one peak varies by a fifth."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 0.7 <= compare(setting)["estimated / measured"] <= 1.3


def test_a_run_that_would_not_fit_names_the_chunk_that_would(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgeo.app.preflight.free_bytes", lambda device: 2**31)
    settings = "run", "--out", "r", "--points", "2000", "--method", "geodesic"
    sentence = refused(capsys, *settings)
    start = "fastgeo: a step of the optimisation would take about "
    assert sentence.startswith(start) and "2GiB are free on cpu; give --chunk " in sentence
    chunk = int(sentence.rpartition(" ")[2])
    for more in (chunk + 1, 2 * chunk):
        words = refused(capsys, *settings, "--chunk", more)
        assert words.startswith(start)
    assert not (tmp_path / "r").exists()
    config = PRESETS["digits"].changed(points=2000)
    for name, fits in (("r", dict(chunk=chunk)), ("s", dict(engine="auto"))):
        with Run.create(tmp_path / name, config.changed(**fits)):
            pass
    monkeypatch.setattr("fastgeo.app.preflight.free_bytes", lambda device: 5 * 2**25)
    config = PRESETS["digits"].changed(engine="auto", cuda_graph=False)  # which finds a chunk
    with Run.create(tmp_path / "u", config):
        pass
    captured = "--method", "geodesic", "--engine", "auto", "--cuda-graph", "True"
    words = refused(capsys, "run", "--out", "v", *captured)
    assert words.startswith(start) and "give --chunk " in words


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_auto_tries_nothing_that_does_not_fit(momentum, module, monkeypatch):
    """Velocities count: three copies of all weights."""
    path, x, found = Path.linear(tiny_resnet(1), tiny_resnet(2), 12), images(24), []
    params = {n: t[None] for n, t in module.state_dict().items()}
    need = step_memory(stack(module), params, x[:8], networks=10, scale=3)
    velocity = 3 * 10 * sum(t.nbytes for t in params.values()) if momentum else 0
    monkeypatch.setattr(
        "fastgeo.step.engines.free_bytes", lambda device: velocity + need.peak(10, 2)
    )
    optimize(path, module, [x], steps=15, on_choice=found.append, descent=plain(momentum=momentum))
    (choice,) = found
    assert choice["chunk"] is not None
    tried = [*choice["seconds"], *choice["failed"]]
    assert "stacked, 2 at a time" in tried
    assert not any(name.startswith("stacked") and "2 at a time" not in name for name in tried)
