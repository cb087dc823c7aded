"""A command on the processes that torchrun started: the first one does it, the others help it.

All that is read, printed and written is the first one's, but for the states of a path. The others
wait until it optimises or evaluates, however long that takes, do so together with it, and end when
it ends. Torchrun exits with 1 whatever happened, so that is noted in the run folder (`status`).

A signal may come to one process, to all, or to torchrun, which passes it on to all that it started,
also to those that have it already; where one of them failed, it sends SIGTERM to the others. What
has not ended half a minute later, it kills. So a signal counts once, and what comes to one that
waits is told to the first, which ends at its next step and with it all of them.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastgeo.app.config import Config
from fastgeo.forward.options import size_of
from fastgeo.ranks.agreement import store
from fastgeo.ranks.axis import LostRank, OtherRank, connected
from fastgeo.step.memory import point_bytes
from fastgeo.store.checkpoint import SIGNALS, Stopped
from fastgeo.store.files import read_json, write_json
from fastgeo.train import seeded

if TYPE_CHECKING:
    from fastgeo.app.folder import Run
    from fastgeo.app.given import Given

ENDED = "stopped.json"
FAILED, UNFINISHED = 2, 1
ALIVE = timedelta(minutes=10)  # that a process waits for another one in a step
PAUSE = 0.2  # seconds between two looks at what others have said
PATIENCE = 5.0  # seconds that one waits for the first after a signal, which may have lost its life
SIGNALLED, ERROR = "fastgeo/signal", "fastgeo/company/error"


class Company:
    """The processes, as one of them sees them; of what they say, the first says all but answers.

    Args:
        along: how many are along a path, if that was asked for.
    """

    def __init__(self, along: int | None) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._along = along
        self._said = 0
        self._leaves = float("inf")  # when this one waits no longer

    def shape(self, config: Config) -> tuple[int, int]:
        """What was asked for, or as many ranks along the path as it has points for, and the others
        over the batch.

        Raises:
            ValueError: that is not possible.
        """
        ranks, along = self.ranks, self._along
        whole = config.forward.batchnorm == "recalibrate"  # is what it needs of a batch
        if along is None:
            points = config.descent.nodes or config.path.points - 2
            along = max(n for n in range(1, ranks + 1) if ranks % n == 0 and n <= points)
            along = ranks if whole else along
        if ranks % along:
            raise ValueError(f"--ranks-path must divide the {ranks} processes, got {along}")
        if whole and along < ranks:
            raise ValueError(
                f"--batchnorm recalibrate needs whole batches, so --ranks-path {ranks}, got {along}"
            )
        return along, ranks // along

    def mesh(self, given: "Given") -> DeviceMesh:
        shape = self.shape(given.config)
        return init_device_mesh(given.device.type, shape, mesh_dim_names=("path", "data"))

    def held(self, given: "Given") -> str:
        """What a rank will hold, in words."""
        c, (along, data) = given.config, self.shape(given.config)
        free, between = c.path.curve == "points" and c.descent.nodes is None, c.path.points - 2
        points = between if c.path.curve == "points" else c.path.controls
        most = -(-points // along) if free else points
        parts = point_bytes(
            sum(p.numel() for p in given.module.parameters() if p.requires_grad),
            momentum=c.descent.momentum > 0,
            ranks=data if free else data * along,
        )
        each = ", ".join(f"{size_of(number)} {what}" for what, number in parts.items())
        return (
            f"{along} x {data} ranks, along the path x over the batch. Of {points} points to move "
            f"a rank holds {'up to ' * (most < points)}{most}, each {each}: "
            f"{size_of(most * sum(parts.values()))}, and the activations of a chunk"
        )

    # --- The first one ----------------------------------------------------------------------------

    def call(self, folder: FilePath, stage: str) -> None:
        """Have the others open a run and begin to help in a stage.

        Raises:
            OSError: one of them cannot.
        """
        answers = [f"fastgeo/answer/{self._said}/{rank}" for rank in range(1, self.ranks)]
        self.say(str(folder.absolute()))
        for rank, answer in enumerate(answers, 1):
            if not self._waited(answer, time.monotonic() + ALIVE.total_seconds()):
                raise LostRank(f"rank {rank} does not answer")
            if why := store().get(answer).decode():
                raise OSError(why)
        self.say(stage)

    def say(self, text: str) -> None:
        """The next thing: a run folder, a stage of it, or nothing, with which all end."""
        store().set(f"fastgeo/say/{self._said}", text)
        self._said += 1

    def cause(self, error: BaseException) -> BaseException:
        """That another process was lost, and why, in place of the signal that torchrun sends then;
        else the error itself."""
        lost = error.__cause__ if isinstance(error, Stopped) else error
        if not isinstance(lost, LostRank):
            return error
        lost.__notes__ = getattr(error, "__notes__", [])
        with contextlib.suppress(RuntimeError):  # the store has ended before
            if store().check([ERROR]):
                lost.args = (store().get(ERROR).decode(),)
        return lost

    def listen(self, ended: threading.Event) -> None:
        """Until then, take a signal to another process as one to this."""
        with contextlib.suppress(RuntimeError):  # the store has ended before
            while not ended.wait(PAUSE):
                if store().check([SIGNALLED]):
                    os.kill(os.getpid(), int(store().get(SIGNALLED)))
                    return

    # --- The others -------------------------------------------------------------------------------

    def heard(self) -> str:
        """What the first says next; nothing also if this one is to end without it."""
        name = f"fastgeo/say/{self._said}"
        self._said += 1
        with connected():
            return store().get(name).decode() if self._waited(name) else ""

    def answer(self, why: str) -> None:
        """That this process can help in what was just said, or why not."""
        store().set(f"fastgeo/answer/{self._said - 1}/{self.rank}", why)

    def pass_on(self, number: int, frame: Any) -> None:
        """A handler of signals: the first stops, and this one with it."""
        with contextlib.suppress(RuntimeError):  # the store has ended, which is noticed soon
            store().compare_set(SIGNALLED, "", str(number))
        self._leaves = time.monotonic() + PATIENCE

    def _waited(self, name: str, until: float = float("inf")) -> bool:
        """Whether something of this name was said, until then or until this one leaves."""
        while not store().check([name]):
            if time.monotonic() > min(until, self._leaves):
                return False
            time.sleep(PAUSE)
        return True


_COMPANY: ContextVar[Company | None] = ContextVar("company", default=None)


def shape_of(config: Config) -> tuple[int, int]:
    """Ranks along the path, and over the batch."""
    company = _COMPANY.get()
    return (1, 1) if company is None else company.shape(config)


def mesh_of(run: "Run", stage: str) -> DeviceMesh | None:
    """The mesh on which a stage of a run is now done; None if this process is alone."""
    company = _COMPANY.get()
    if company is None:
        return None
    company.call(run.folder, stage)
    return company.mesh(run.given)


def mesh_of_all(given: "Given") -> DeviceMesh | None:
    """The mesh of a command that all processes do alike; None if this one is alone."""
    company = _COMPANY.get()
    if company is None:
        return None
    print(company.held(given), flush=True)
    return company.mesh(given)


def together(command: Callable[[], None], *, along: int | None, alike: bool) -> None:
    """Do a command in the first process, and help it in the others.

    Args:
        along: ranks along a path, if that was asked for.
        alike: whether they help by doing the same, which only the first tells of.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=ALIVE)
    company = Company(along)
    try:
        if alike:
            _COMPANY.set(company)
            command()
        elif company.rank == 0:
            _handle(_stop)
            _lead(company, command)
        else:
            _handle(company.pass_on)
            _follow(company)
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def noted(run: "Run") -> Iterator[None]:
    """How a command in a run folder ends is noted there, if it is one of several processes."""
    file, company = run.folder / ENDED, _COMPANY.get()
    file.unlink(missing_ok=True)
    if company is None:
        yield
        return
    why, code = "finished", 0
    try:
        if "optimize" not in run.stages:
            print(company.held(run.given), flush=True)
        yield
    except BaseException as caught:
        _handle(signal.SIG_IGN)
        error = company.cause(caught)
        why, code = str(error) or type(error).__name__, getattr(error, "exit_code", FAILED)
        if error is not caught:
            raise error from None
        raise
    finally:
        with contextlib.suppress(OSError):  # the disk is full: said already
            write_json(file, {"why": why, "exit_code": code})


def status(folder: FilePath) -> tuple[str, int]:
    """How a run on several processes ended, in words, and the exit code of that."""
    if not (folder / ENDED).exists():
        return f"{folder} has not ended, or not by itself", UNFINISHED
    content = read_json(folder / ENDED)
    return content["why"], content["exit_code"]


def _handle(handler: Any) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _stop(number: int, frame: Any) -> None:
    """A handler of signals where there is no step to finish."""
    _handle(signal.SIG_IGN)
    raise Stopped(*SIGNALS[number])


def _lead(company: Company, command: Callable[[], None]) -> None:
    token, ended = _COMPANY.set(company), threading.Event()
    listener = threading.Thread(target=company.listen, args=(ended,), daemon=True)
    listener.start()
    try:
        command()
    finally:
        ended.set()
        listener.join()
        _COMPANY.reset(token)
        with contextlib.suppress(RuntimeError):  # the store has ended before
            company.say("")


def _follow(company: Company) -> None:
    """Help until the first ends, or this one fails in a stage, with which both end."""
    helped = True
    while helped and (folder := company.heard()):
        run = _opened(company, FilePath(folder))
        stage = company.heard()
        helped = run is not None and stage != "" and _helped(company, run, stage)


def _opened(company: Company, folder: FilePath) -> "Run | None":
    from fastgeo.app.folder import Run
    from fastgeo.app.stages import first_path

    try:
        if not (folder / "config.json").exists():
            raise OSError(f"it sees no run in {folder}, and all need one folder")
        run = Run.open(folder)
        run.quiet = True
        first_path(run)
    except Exception as error:  # noqa: BLE001 - whatever a user's data or network raise
        company.answer(f"rank {company.rank} on {socket.gethostname()} cannot help: {error}")
        return None
    company.answer("")
    return run


def _helped(company: Company, run: "Run", stage: str) -> bool:
    """Whether this came to its end; what else there is to say is said by the first process."""
    from fastgeo.app.stages import HELP

    try:
        with (
            open(os.devnull, "w") as nothing,
            contextlib.redirect_stderr(nothing),
            seeded(run.config.path.path_seed, run.given.device),
        ):
            HELP[stage](run, company.mesh(run.given))
    except (KeyboardInterrupt, OtherRank):
        return False
    except Exception as error:  # noqa: BLE001 - the first may only see that this one is gone
        text = f"rank {company.rank} stopped: {error or type(error).__name__}"
        with contextlib.suppress(RuntimeError):
            store().compare_set(ERROR, "", text)
        return False
    return True
