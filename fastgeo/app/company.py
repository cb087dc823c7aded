"""A command on the processes that torchrun started: the first one does it, the others help it.

All that is read, printed and written is the first one's, but for the states of a path. The others
wait until it optimises a path, however long that takes, do so together with it, and end when it
ends. Torchrun exits with 1 whatever happened, so that is noted in the run folder (`status`).
"""

import contextlib
import os
import sys
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path as FilePath

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgeo.app.folder import Run
from fastgeo.ranks.agreement import store
from fastgeo.store.checkpoint import INTERRUPTED
from fastgeo.store.files import read_json, write_json
from fastgeo.train import seeded

ENDED = "stopped.json"
FAILED, UNFINISHED = 2, 1
ALIVE = timedelta(minutes=10)  # that a process waits for another one in a step
EVER = timedelta(days=365)


class Company:
    """The other processes, as the first one sees them."""

    def __init__(self) -> None:
        self._said = 0

    def say(self, text: str) -> None:
        """Have them do the next thing: help in a run folder, or end where that is empty."""
        store().set(f"fastgeo/say/{self._said}", text)
        self._said += 1


_COMPANY: ContextVar[Company | None] = ContextVar("company", default=None)


def mesh_of(run: Run) -> DeviceMesh | None:
    """The mesh on which the path of a run is now optimised; None if this process is alone."""
    company = _COMPANY.get()
    if company is None:
        return None
    company.say(str(run.folder.absolute()))
    return _mesh(run)


def together(command: Callable[[], None], folder: FilePath | None) -> None:
    """Do a command in the first process, and help it in the others.

    Args:
        folder: of the run, if the command works in one.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=ALIVE)
    try:
        if dist.get_rank() == 0:
            _lead(command, folder)
        else:
            _follow()
    finally:
        dist.destroy_process_group()


def status(folder: FilePath) -> tuple[str, int]:
    """How a run on several processes ended, in words, and the exit code of that."""
    if not (folder / ENDED).exists():
        return f"{folder} has not ended, or not by itself", UNFINISHED
    content = read_json(folder / ENDED)
    return content["why"], content["exit_code"]


def _lead(command: Callable[[], None], folder: FilePath | None) -> None:
    company = Company()
    token = _COMPANY.set(company)
    why, code = "finished", 0
    try:
        command()
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        code = getattr(error, "exit_code", INTERRUPTED if stopped else FAILED)
        why = str(error) or type(error).__name__
        raise
    finally:
        _COMPANY.reset(token)
        company.say("")
        if folder is not None and (folder / "config.json").exists():
            write_json(folder / ENDED, {"why": why, "exit_code": code})


def _follow() -> None:
    said = 0
    while True:
        name = f"fastgeo/say/{said}"
        store().wait([name], EVER)
        folder = store().get(name).decode()
        if not folder:
            return
        with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
            _help(FilePath(folder))
        said += 1


def _help(folder: FilePath) -> None:
    from fastgeo.app.stages import first_path, optimized

    try:
        run = Run.open(folder)
        run.quiet = True
        path, mesh = first_path(run), _mesh(run)
    except Exception as error:
        rank = dist.get_rank()
        print(f"fastgeo: rank {rank} cannot help: {error}", file=sys.__stderr__)
        raise SystemExit(FAILED) from error
    # What ends it is said by the first process, in which it ends as well.
    with (
        contextlib.suppress(Exception, KeyboardInterrupt),
        seeded(run.config.path.path_seed, run.given.device),
        run.checkpoints("optimize", "metrics.jsonl") as checkpoints,
    ):
        optimized(run, path, run.forward("optimize")[0], checkpoints, mesh=mesh)


def _mesh(run: Run) -> DeviceMesh:
    """As many ranks along the path as it has points for, the others over the batch."""
    ranks, points = dist.get_world_size(), run.config.descent.nodes or run.config.path.points - 2
    along = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n <= points)
    if run.config.forward.batchnorm == "recalibrate":  # which needs the whole batch
        along = ranks
    shape = along, ranks // along
    return init_device_mesh(run.given.device.type, shape, mesh_dim_names=("path", "data"))
