"""Runs that are killed, stopped, or find no place to write: nothing computed is lost."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest
from processes import Parent, wait_until

SETTINGS = [
    *("--width", "0.25", "--train-subset", "400", "--epochs", "6", "--train-batch-size", "40"),
    *("--points", "5", "--steps", "30", "--batch-size", "100", "--augment", "flip-crop"),
    *("--method", "geodesic", "--lr", "0.1"),
]
OFTEN = ["--checkpoint-seconds", "0.05"]
STAGES = ("train", "match", "optimize", "evaluate", "plot")
EXACT = (
    *("ends.safetensors", "permutation.safetensors", "path.safetensors", "training.jsonl"),
    *("metrics.jsonl", "path_loss.png", "path_length.png"),
)


@pytest.fixture(scope="module")
def fastgeo(tmp_path_factory):
    parent = Parent(tmp_path_factory.mktemp("output"))
    yield parent
    parent.close()


@pytest.fixture(scope="module")
def uncut(fastgeo, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "uncut"
    process, code = fastgeo.run("run", "--out", folder, *SETTINGS)
    assert code == 0, process.stderr
    return folder


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def finished(folder):
    """The stages that config.json tells of."""
    try:
        return list(json.loads((Path(folder) / "config.json").read_text())["stages"])
    except FileNotFoundError:
        return []


def without_seconds(report):
    report = json.loads((Path(report) / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in ("seconds", "checksum")}


def assert_same(folder, uncut):
    assert {file.name for file in Path(folder).iterdir()} == {f.name for f in uncut.iterdir()}
    for name in EXACT:
        assert (Path(folder) / name).read_bytes() == (uncut / name).read_bytes(), name
    assert without_seconds(folder) == without_seconds(uncut)


def lines(file):
    try:
        return Path(file).read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def test_a_run_killed_at_twenty_moments_ends_like_one_that_was_not(fastgeo, uncut):
    """SIGKILL in every stage; gone on with each time; compared bit for bit, and line for line."""
    seconds = json.loads((uncut / "report.json").read_text())["seconds"] | {"plot": 1.0}
    targets = ["train"] * 6 + ["match"] + ["optimize"] * 6 + ["evaluate"] * 4 + ["plot"] * 3
    hit, seed = [], random.randrange(10**6)
    draw = random.Random(seed)
    for i, target in enumerate(targets):
        process = fastgeo.start("run", "--out", "r", *SETTINGS, *OFTEN, "--resume")
        before = list(STAGES[: STAGES.index(target)])
        wait_until(lambda b=before, p=process: finished("r")[: len(b)] == b or p.has_ended())
        first = target not in targets[:i]
        wait = draw.uniform(0, 0.02 if first else 0.5 * seconds[target])
        with pytest.raises(AssertionError):
            wait_until(process.has_ended, wait)
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stderr
        hit.append(len(finished("r")))
    assert len(hit) == 20 and set(hit) == set(range(5)), (hit, seed)
    process, code = fastgeo.run("run", "--out", "r", "--resume")
    assert code == 0, process.stderr
    assert_same("r", uncut)
    process, code = fastgeo.run("run", "--out", "r", "--resume")  # nothing is left to do
    assert code == 0 and "train:" not in process.stderr and "geodesic" in process.stdout


def test_a_signal_lets_the_step_finish_and_saves(fastgeo, uncut):
    for stage, log, number, expected in (
        ("train", "training.jsonl", signal.SIGINT, 130),
        ("optimize", "metrics.jsonl", signal.SIGTERM, 143),
    ):
        process = fastgeo.start("run", "--out", "r", *SETTINGS, "--resume")
        wait_until(lambda log=log: lines(f"r/{log}") > 5)
        process.kill(number)
        assert process.wait() == expected
        assert "go on with: fastgeo run --out r --resume" in process.stderr
        assert "Traceback" not in process.stderr
        (saved,) = os.listdir("r/checkpoint")
        state = json.loads(Path(f"r/checkpoint/{saved}/state.json").read_text())
        assert state["stage"] == stage and state["step"] == lines(f"r/{log}")
    process, code = fastgeo.run("run", "--out", "r", "--resume")
    assert code == 0, process.stderr
    assert_same("r", uncut)


def test_a_second_signal_stops_at_once(fastgeo, uncut):
    # A step of seconds, which the second signal cuts.
    shutil.copytree(uncut, "r")
    big = ["--points", "200", "--batch-size", "400", "--overwrite"]
    process = fastgeo.start("optimize", "r", *big)
    wait_until(lambda: "optimize:" in process.stderr)
    process.kill(signal.SIGINT)
    wait_until(lambda: "again to stop at once" in process.stderr)
    process.kill(signal.SIGINT)
    assert process.wait() == 130 and "interrupted at once" in process.stderr
    assert finished("r") == ["train", "match"]


def test_a_second_process_on_the_same_folder_is_refused(fastgeo, uncut):
    first = fastgeo.start("run", "--out", "r", *SETTINGS, "--steps", "100000")
    wait_until(lambda: lines("r/metrics.jsonl") > 2)
    before = finished("r")
    for argv in (
        ["run", "--out", "r", "--resume"],
        ["run", "--out", "r", *SETTINGS, "--overwrite"],
        ["match", "r", "--overwrite"],
        ["optimize", "r", "--resume"],
        ["train", "--out", "r", "--overwrite"],
    ):
        second, code = fastgeo.run(*argv)
        assert code == 2, argv
        assert second.stderr == (
            "fastgeo: another process is at work in r; wait for it, or name another folder\n"
        )
    assert finished("r") == before and not first.has_ended()
    first.kill()
    first.wait()
    assert os.path.exists("r/.lock")  # which means nothing: the system's lock is gone
    _, code = fastgeo.run("match", "r", "--overwrite")
    assert code == 0 and not os.path.exists("r/.lock")


def test_two_processes_that_start_in_one_moment_make_one_run(fastgeo, uncut):
    both = [fastgeo.start("run", "--out", "r", *SETTINGS) for _ in range(2)]
    codes = [process.wait() for process in both]
    assert sorted(codes) == [0, 2]
    refused = both[codes.index(2)].stderr
    assert "another process is at work in r" in refused or "already holds a run" in refused
    assert_same("r", uncut)


def test_a_full_disk_is_named_and_the_last_good_state_stays(fastgeo, uncut):
    """No file may grow beyond a limit, which the path's exceed and all before them do not."""
    assert (uncut / "ends.safetensors").stat().st_size < 2**16
    assert (uncut / "path.safetensors").stat().st_size > 2**16 + 2**15
    limit = {"largest_file": 2**16 + 2**15}
    process, code = fastgeo.run("run", "--out", "r", *SETTINGS, **limit)
    assert code == 2 and finished("r") == ["train", "match"]
    last = process.stderr.splitlines()[-1]
    assert last.startswith("fastgeo: cannot write r/path.safetensors: ") and "large" in last
    assert last.endswith("go on with: fastgeo run --out r --resume")

    process = fastgeo.start("run", "--out", "r", *OFTEN, "--resume")
    wait_until(lambda: len(list(Path("r/checkpoint").glob("optimize-*"))) == 2)
    process.kill()
    process.wait()
    saved = {file: file.read_bytes() for file in Path("r/checkpoint").glob("opt*/*")}
    process, code = fastgeo.run("run", "--out", "r", *OFTEN, "--resume", **limit)
    assert code == 2 and "fastgeo: cannot write r/checkpoint/" in process.stderr
    assert {file: file.read_bytes() for file in Path("r/checkpoint").glob("**/*.*s*")} == saved
    process, code = fastgeo.run("run", "--out", "r", "--resume")
    assert code == 0, process.stderr
    assert_same("r", uncut)


def test_a_full_disk_stops_a_log_in_the_middle_of_a_line(fastgeo):
    """The log of so many steps is the longest file of all when the disk is full."""
    settings = [word if word != "40" else "8" for word in SETTINGS]
    process, code = fastgeo.run("run", "--out", "uncut", *settings)
    assert code == 0, process.stderr
    size = Path("uncut/training.jsonl").stat().st_size // 2 + 7
    assert size > Path("uncut/config.json").stat().st_size
    process, code = fastgeo.run("run", "--out", "r", *settings, largest_file=size)
    assert code == 2 and "cannot write r/training.jsonl: File too large" in process.stderr
    process, code = fastgeo.run("run", "--out", "r", *settings, "--resume")
    assert code == 0, process.stderr
    assert_same("r", Path("uncut"))


def test_a_read_only_folder_gets_a_sentence(fastgeo, uncut, tmp_path):
    shutil.copytree(uncut, "r")
    for folder in (tmp_path, Path("r")):
        folder.chmod(0o555)
    for argv, file in (
        (["run", "--out", "r", "--resume"], "r/.lock"),
        (["optimize", "r", "--overwrite"], "r/.lock"),
    ):
        process, code = fastgeo.run(*argv, bound_by_modes=True)
        assert code == 2, process.stderr
        assert process.stderr == f"fastgeo: cannot write {file}: Permission denied\n"
    tmp_path.chmod(0o755)
    Path("r").chmod(0o755)
    assert_same("r", uncut)
