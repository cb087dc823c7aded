"""The command that measures a GPU, in small: no part fails on a CPU for a reason that is Python's,
what goes wrong costs one part, and kernels compiled beforehand are those that are launched."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from fastgeo_kernels.stacked.conv_table import TABLE, Shape, Ways

from benchmarks import device, readme
from benchmarks.device_parts import kernels, machine, records, tables
from benchmarks.device_parts.given import Given, Sizes, counted
from benchmarks.step_gpu import Setting

ROOT = Path(__file__).parents[2]
# Read where Python starts: what a bare installation of PyTorch has not is not found. The tests for
# GPUs may have all that tests need, but for the command line's packages.
BARE = """
import sys

class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        missing_here = name.split(".")[0] in missing
        return None if missing_here else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

missing = {"tyro", "docstring_parser", "liger_kernel"}
if "pytest" not in sys.orig_argv:
    missing |= {"scipy", "matplotlib", "tqdm", "torchvision", "hypothesis", "pytest"}
sys.meta_path[:] = map(Bare, sys.meta_path)
"""


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The records of a dry run in a bare installation."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "sitecustomize.py").write_text(BARE)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.device", "--dry-run", "--out", str(folder / "out")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = records.read(folder / "out" / records.FILE)
    assert result.returncode == 0, result.stdout[:4000] + result.stderr[-3000:]
    return found


def test_every_part_is_ok_in_a_dry_run(dry):
    ends = records.ends(dry)
    assert list(ends) == [part.name for part in device.parts()] and len(ends) == 8
    assert {end["status"] for end in ends.values()} == {"ok"}
    rows = {part: records.rows(dry, part) for part in ends}
    assert all(rows.values())
    assert not [row for part in rows.values() for row in part if row.get("failed")]
    ways = {
        row["case"].split(",")[-2].strip() for row in rows["kernels"] if "conv 3" in row["case"]
    }
    assert ways == {"grouped", "dense", "triton"}
    assert {row["way"] for row in rows["divergence"]} == {"Triton", "copy", "paper's loop"}
    assert len(rows["convolutions"]) == 2 * 3 * 3 * 2  # shapes, products, ways, searched or not
    names = [row["name"] for part in ("step", "compiled") for row in rows[part] if "name" in row]
    assert len(names) == 8 and len(set(names)) == 6
    how = [row.get("how", "as it is") for row in rows["step"] if row.get("name") == names[0]]
    assert how == ["as it is", "table as measured", "4 streams"]
    assert sum("kernel" in row for row in rows["step"]) > 10
    assert [len(row["energies"]) for row in rows["precision"]] == [3, 3, 3, 0]


def test_records_become_a_results_file_lines_of_the_table_and_tables(dry, tmp_path, monkeypatch):
    file = tmp_path / records.FILE
    file.write_text("\n".join(map(json.dumps, dry)) + '\n{"part": "tes')  # cut short
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "results")
    tables.merge(file)
    result = json.loads((tmp_path / "results" / "device-cpu.json").read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert {end["status"] for end in result["parts"].values()} == {"ok"}
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    for section in tables.SECTIONS:
        text = readme.device("device-cpu", section)
        assert "Measured by `python -m benchmarks.device --dry-run" in text, section
        assert ("| --- |" in text) == (section not in ("machine", "correctness")), section
    step = readme.device("device-cpu", "step")
    assert "fastgeo, bf16, CUDA graph, table as measured" in step and "compiled, CUDA graph" in step
    table = eval("{" + tables.conv_table(result["rows"]).split("\n\n")[1] + "}")  # noqa: S307
    assert set(table) == {Shape(3, 1, 4, 4, 4), Shape(1, 2, 4, 8, 4)}
    assert all(isinstance(ways, Ways) for ways in table.values())


def given(folder: Path, seconds: float = 60.0) -> Given:
    folder.mkdir(exist_ok=True)
    return Given("cpu", Sizes(), folder, seconds, time.monotonic())


def fails(_):
    yield {"n": 1}
    raise ValueError("this is why")


def hangs(_):
    yield {"n": 1}
    subprocess.run(["sleep", "100"])
    yield {"n": 2}


def dies(_):
    yield {"n": 1}
    os._exit(3)


def is_wrong(_):
    yield {"n": 1, "failed": "off by one"}
    yield {"n": 2}


def sound(_):
    yield {"n": 1}


def test_a_part_that_fails_hangs_or_dies_costs_itself_only(tmp_path, monkeypatch, capfd):
    made = (fails, hangs, dies, is_wrong, sound)
    found = [device.Part(f.__name__, 3.0 if f is hangs else 60.0, f) for f in made]
    monkeypatch.setattr(device, "parts", lambda: found)
    assert not device.measure(tmp_path, minutes=9, dry=False, only=[])
    seen = records.read(tmp_path / records.FILE)
    ends = records.ends(seen)
    statuses = [ends[f.__name__]["status"] for f in made]
    assert statuses == ["failed", "timed out", "failed", "failed", "ok"]
    assert "ValueError: this is why" in ends["fails"]["why"][-1]
    assert any("in hangs" in line for line in ends["hangs"]["why"])  # where it hung
    assert ends["dies"]["why"] == ["exit status 3"]
    assert "1 rows failed, the first of them: off by one" in ends["is_wrong"]["why"][-1]
    rows = {f.__name__: len(records.rows(seen, f.__name__)) for f in made}
    assert rows == {"fails": 1, "hangs": 1, "dies": 1, "is_wrong": 2, "sound": 1}
    assert not subprocess.run(["pgrep", "-f", "^sleep 100$"]).returncode == 0


def test_what_no_longer_fits_is_left_out(tmp_path, monkeypatch):
    found = [device.Part("short", 2.0, sound), device.Part("long", 60.0, sound)]
    monkeypatch.setattr(device, "parts", lambda: found)
    assert not device.measure(tmp_path, minutes=10 / 60, dry=False, only=[])
    ends = records.ends(records.read(tmp_path / records.FILE))
    assert [end["status"] for end in ends.values()] == ["ok", "left out"]
    assert device.measure(tmp_path, minutes=10 / 60, dry=False, only=["short"])  # again, alone
    assert len(records.rows(records.read(tmp_path / records.FILE), "short")) == 1


class Event:
    """Of a device whose time is the host's."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.time - self.time)


def test_times_on_a_device_are_its_own_events_and_the_machine_says_what_it_is(
    tmp_path, monkeypatch
):
    """What a CPU has not, made up with the names of what a GPU has."""
    monkeypatch.setattr(Given, "gpu", True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    slept, written = [], []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda t: written.append(t.nbytes))
    seconds = given(tmp_path).times(lambda: time.sleep(0.01), 0.1, cold=True)
    assert 3 <= len(seconds) <= 10 and all(0.01 <= s < 0.1 for s in seconds)
    assert len(slept) == len(seconds) and set(written) == {256 << 20}
    assert len(given(tmp_path).times(lambda: time.sleep(0.01), 0.001)) == 1
    chip = mock.Mock(spec=torch._C._CudaDeviceProperties, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: chip)
    row = next(machine.machine(given(tmp_path)))
    assert row["capability"] == "9.0" and row["slug"] == "cpu" and "multiprocessors" in row


def cell(search, shape, product, way, ms):
    how = dict(search=search, shape=list(shape), product=product, way=way, count=2)
    return how | ({"failed": "slow"} if ms is None else {"ms": {"p50": ms}})


def test_the_table_has_the_fastest_ways_of_one_layout():
    shape, rows = Shape(3, 1, 64, 64, 32), []
    times = {  # way -> forward, input, weight
        False: {"grouped": (1.0, 1.0, None), "dense": (2.0, 3.0, 3.0), "triton": (1.9, 2.9, 1.0)},
        True: {"grouped": (1.0, 1.0, 40.0), "dense": (2.0, 3.0, 3.0), "triton": (1.95, 1.0, 2.9)},
    }
    for search, ways in times.items():
        for way, each in ways.items():
            rows += [
                cell(search, shape, product, way, ms)
                for product, ms in zip(Ways._fields, each, strict=True)
            ]
    best = kernels.best_table(rows)
    assert best["layout"] == "(B, H, W, N, C)" and best["search"] is False
    assert best["table"] == [[shape, ["grouped", "grouped", "triton"]]]
    assert best["ms a step"] == 2 * (1 + 1 + 1)
    around = kernels.best_table([row for row in rows if row["way"] != "grouped"])
    assert around["ms a step"] == 2 * (1.9 + 2.9 + 1.0) and around["layout"] == "(B, H, W, N, C)"
    assert kernels.best_table([]) is None
    before = dict(TABLE)
    with kernels.applied(best):
        assert TABLE[shape] == Ways("grouped", "grouped", "triton")
    assert before == TABLE


def test_convolutions_are_counted_as_often_as_a_step_has_them():
    assert sum(counted(TABLE, Setting()).values()) == 20  # and the first one, of three channels
    assert counted(TABLE, Setting())[Shape(3, 1, 64, 64, 32)] == 6


COMPILE = """
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget

from benchmarks import precompile
from benchmarks.device_parts import given, kernels

precompile.take(Path(sys.argv[1]))
sizes = replace(given.TINY, dtype=torch.bfloat16)
names = ["conv 3, 1, 4, 4, 4, triton, bfloat16", "group norm, C = 4, 4x4, bfloat16", "update"]

def cases(device):
    found = kernels.cases(given.Given(device, sizes, Path(), 0, 0))
    return [(name, found[name]) for name in names]

with precompile.without(GPUTarget("cuda", 90, 32), 132):
    some = islice(precompile.launches(sizes), 15, None, 20)  # of every kind
    found = precompile.compile_all([*cases("meta"), *some])
    again = found.pop("found")
    print(found.total(), again)
    for name, case in cases("cpu"):
        with mock.patch.object(torch.Tensor, "is_cuda", property(lambda tensor: True)):
            seen = precompile.Compilations()
            try:
                case()
            except AssertionError:  # nothing has been computed
                pass
        print(name, seen.compiled)
"""


def test_kernels_compiled_beforehand_are_those_that_are_launched(tmp_path):
    """Compiled without numbers; then found from another folder, and by tensors with numbers."""

    def compiled(cache):
        result = subprocess.run(
            [sys.executable, "-c", COMPILE, str(cache)],
            env={**os.environ, "TRITON_STORE_BINARY_ONLY": "1", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        first, *others = result.stdout.splitlines()
        assert len(others) == 3 and all(line.endswith(" 0") for line in others), others
        return [int(number) for number in first.split()]

    (tmp_path / "here").mkdir()
    new, found = compiled(tmp_path / "here")
    assert new > 10
    (tmp_path / "here").rename(tmp_path / "there")
    again, found = compiled(tmp_path / "there")
    assert again == 0 and found >= new


def test_tests_for_gpus_are_in_files_that_say_so():
    """`-m gpu` reads no others."""
    marked = [f for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()]
    assert {f.stem[-3:] for f in marked if f != Path(__file__)} == {"gpu"}
