"""`fastgeo run` on the processes of torchrun leaves what one process leaves, also if it is cut."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path as FilePath

import pytest
import torch
import torch.distributed as dist
from commands import FILES, SMALL, refused

from fastgeo import Path
from fastgeo.app import company
from fastgeo.app.cli import main
from fastgeo.app.company import ALIVE, Company
from fastgeo.store.checkpoint import Checkpoints, State, Stopped
from fastgeo.store.files import read_json

ROOT = FilePath(__file__).parents[2]
SETTINGS = [
    *SMALL,
    *("--engine", "stacked", "--chunk", "2", "--method", "geodesic", "--lr", "0.1"),
]
FAULTY = FilePath(__file__).with_name("faulty.py")


def torchruns(nodes, *argv):
    """What a command prints on so many processes of each node; each node is a torchrun here."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(nodes)}"]
    launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--local-addr=localhost"]
    started = [
        subprocess.Popen(
            [*launch, f"--nproc-per-node={ranks}", *map(str, argv)],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for ranks in nodes
    ]
    found = []
    try:
        for process in started:
            out, err = process.communicate(timeout=240)
            found.append(subprocess.CompletedProcess(argv, process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
    return found


def faulty(fault, *argv):
    """A command on two ranks, one of which gets a signal (`faulty.py`)."""
    (found,) = torchruns([2], FAULTY, fault, *argv, "--quiet", "--checkpoint-seconds", "0")
    assert found.stderr.count("Traceback") <= 1, found.stderr  # torchrun's own
    return found


def status(folder, capsys):
    """Exit code and line of `fastgeo status`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["status", str(folder)])
    return ended.value.code, capsys.readouterr().out.strip()


def test_a_run_of_two_torchruns_leaves_the_report_and_files_of_one_process(tmp_path, capsys):
    alone, several = tmp_path / "alone", tmp_path / "several"
    main(["run", "--out", str(alone), *SETTINGS])
    found = torchruns([2, 1], "-m", "fastgeo", "run", "--out", several, *SETTINGS)
    assert [node.returncode for node in found] == [0, 0], found
    out = "".join(node.stdout for node in found)
    assert out.count("Report, figures and weights") == 1
    assert out.count("3 x 1 ranks, along the path x over the batch. Of 3 points to move a ") == 1
    assert {f.name for f in several.iterdir()} >= FILES | {"stopped.json"}
    one, other = (Path.load(folder / "path.safetensors") for folder in (alone, several))
    torch.testing.assert_close(other.interior, one.interior, rtol=0, atol=1e-4)
    reports = [
        read_json(folder / "report.json")["paths"]["geodesic"] for folder in (alone, several)
    ]
    for name in ("energy", "sqrt_jsd", "euclidean"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=1e-3)
    lines = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (alone, several)]
    assert len(lines[0]) == len(lines[1]) == 4
    assert status(several, capsys) == (0, "finished")
    main(["evaluate", str(several), "--overwrite"])  # in one process
    assert not (several / "stopped.json").exists()


LOST = "the connection to another rank was lost"


def test_a_run_that_is_cut_short_ends_as_it_would_have(tmp_path, capsys):
    """By a signal while the first process trains, and by one that kills in the optimisation."""
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    run = "run", "--out", uncut, *SETTINGS, "--steps", "12"
    found = faulty("0:fastgeo.store.checkpoint:Checkpoints.record:9:SIGINT:others", *run)
    assert found.returncode and found.stderr.count("fastgeo: interrupted; go on with: ") == 1
    assert status(uncut, capsys) == (130, "interrupted")
    assert list((uncut / "checkpoint").glob("train-*"))
    assert faulty("none", *run, "--resume").returncode == 0
    shutil.copytree(uncut, cut)
    started, exchange = time.monotonic(), "1:fastgeo.ranks.axis:Axis.exchange:40:SIGKILL:rank"
    assert faulty(exchange, "optimize", cut, "--overwrite").returncode
    assert time.monotonic() - started < 120  # of which a busy machine takes most to start
    code, said = status(cut, capsys)
    assert code == 2 and LOST in said
    assert sorted((cut / "checkpoint").glob("optimize-*"))
    assert faulty("none", "optimize", cut, "--resume").returncode == 0
    assert status(cut, capsys) == (0, "finished")
    for name in ("path.safetensors", "metrics.jsonl"):
        assert (cut / name).read_bytes() == (uncut / name).read_bytes()


def test_under_torchrun_a_signal_counts_once(tmp_path, monkeypatch):
    """It may come to a process by itself and from torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(Stopped, match="^terminated$"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.load("train")
        for step in range(5):
            checkpoints.reached(State(step, {}))
            if step > 1:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)
    assert os.listdir(tmp_path) == ["train-000000003"]


def test_a_signal_behind_the_last_step_is_not_lost(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with Checkpoints(tmp_path):
            signal.raise_signal(signal.SIGTERM)
            assert not seen
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


# --- The company, without torchrun ----------------------------------------------------------------


@pytest.fixture
def two(monkeypatch):
    """The first of two processes, and the other; what they say is in the memory of this one."""
    store = dist.HashStore()
    monkeypatch.setattr(company, "store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    found = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        found.append(Company(None))
    return found


@contextlib.contextmanager
def beside(function, *args):
    thread = threading.Thread(target=function, args=args)
    thread.start()
    yield
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_a_folder_that_one_process_cannot_see_is_said_by_the_first(two, tmp_path):
    first, other = two
    with beside(company._follow, other):
        with pytest.raises(OSError, match=r"^rank 1 on .* cannot help: it sees no run in /"):
            first.call(tmp_path, "optimize")
        first.say("")


def test_a_process_waits_longer_than_one_in_a_step(two, monkeypatch, tmp_path):
    """As for a matching."""
    first, other = two
    monkeypatch.setattr(company, "ALIVE", ALIVE * 0)
    heard = []
    with beside(lambda: heard.extend(iter(other.heard, ""))):
        time.sleep(1)
        first.say("optimize")
        first.say("")
    assert heard == ["optimize"]


def test_a_process_that_is_signalled_tells_the_first_and_leaves(two, monkeypatch):
    first, other = two
    monkeypatch.setattr(company, "PATIENCE", 0.5)
    killed = []
    monkeypatch.setattr(os, "kill", lambda *what: killed.append(what))
    with beside(first.listen, threading.Event()):
        other.pass_on(15, None)
        assert other.heard() == ""  # for the first may have been killed
    assert killed == [(os.getpid(), 15)]


def test_ranks_along_the_path_are_chosen_or_refused(two, capsys):
    with pytest.raises(ValueError, match="--ranks-path must divide the 2 processes, got 3"):
        Company(3).shape(company.Config())
    assert [Company(along).shape(company.Config()) for along in (None, 1)] == [(2, 1), (1, 2)]
    assert "for several processes" in refused(capsys, "run", "--ranks-path", 2)
