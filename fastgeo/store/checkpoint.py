"""Where a loop is, on disk: what it takes to go on to the last bit after any end of the process.

    FOLDER/STAGE-STEP/state.json            the step, what the state belongs to, SHA-256 of the rest
                      state.safetensors     generators, order of the data, momentum
                      path.safetensors      the path, or ends.safetensors: the networks

A state is complete or absent, and the two newest are kept.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, BinaryIO

import torch
from torch import Tensor
from tqdm import tqdm

from fastgeo.store.files import (
    PART,
    cannot_write,
    read_json,
    read_tensors,
    remove_folder,
    sha256_of,
    sync_folder,
    write_json,
    write_tensors,
)

Groups = Mapping[str, Mapping[str, Tensor]]
KEPT = 2
NAME = re.compile(r"\.?[a-z]+-\d{9}(\.old)?(\.part)?")  # of a state's folder
SHARE = 20  # times as long as saving took, at least, to the next time
INTERRUPTED, TERMINATED, TIME_IS_UP = 130, 143, 75  # exit codes; the last is sysexits' EX_TEMPFAIL
SIGNALS: dict[int, tuple[str, int]] = {
    signal.SIGINT: ("interrupted", INTERRUPTED),
    signal.SIGTERM: ("terminated", TERMINATED),
}


class Stopped(KeyboardInterrupt):
    """A loop was asked to stop, and did after a step, with its state on disk.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM, 75 when its time was up.
    """

    def __init__(self, why: str, exit_code: int):
        super().__init__(why)
        self.exit_code = exit_code


@dataclass
class State:
    """A loop before a step.

    Attributes:
        step: the next one.
        tensors: kind -> group -> name -> tensor; each kind is a file.
        values: numbers and the like, as JSON.
        generators: states of torch's own generators.
        seconds: that all processes spent on the loop so far.
        log_size: bytes of the log so far.
    """

    step: int
    tensors: dict[str, Groups]
    values: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    log_size: int = 0

    def set_generators(self) -> None:
        """Torch's random numbers go on from here."""
        for name, state in self.generators.items():
            if name == "cpu":
                torch.set_rng_state(state)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(state, name)


class Checkpoints:
    """States of one loop in a folder, saved now and then, and before it stops.

    As a context, SIGINT and SIGTERM let the loop finish its step and save its state, which raises
    `Stopped`; a second one stops it at once, but for processes of torchrun, which passes on what
    they may have had already. Any other error leaves the last good state there.

    Args:
        folder: made when it is first needed.
        seconds: between two states. More where saving takes more than a twentieth of the time.
        max_minutes: the loop stops with its state saved once so many have passed.
        of: what the states belong to, as JSON; states of anything else are refused.
        log: JSON Lines, which grows by a line a step and is cut back to the step that is gone on
            from.
        started: what `time.monotonic` returned when the minutes began; now by default.

    Example:
        >>> with fastgeo.Checkpoints("states") as checkpoints:  # done again, it goes on from there
        ...     path = fastgeo.optimize(path, module, batches, steps=1000, checkpoints=checkpoints)
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        seconds: float = 60.0,
        max_minutes: float | None = None,
        of: Mapping[str, Any] | None = None,
        log: str | os.PathLike | None = None,
        started: float | None = None,
    ):
        self.folder, self.seconds = FilePath(folder), seconds
        self.of = json.loads(json.dumps(of or {}))
        self.log = None if log is None else _Log(FilePath(log))
        self.seconds_before = 0.0  # that earlier processes spent on the states gone on from
        self._started = self._saved = time.monotonic()
        self._minutes = max_minutes
        self._minutes_from = self._started if started is None else started
        self._pause = seconds
        self._stage = ""
        self._now: State | None = None
        self._before: State | None = None
        self._asked: Stopped | None = None
        self._signal = 0  # by which
        self._handlers: dict[int, Any] = {}

    def load(self, stage: str) -> State | None:
        """The newest state of a stage that is intact; None if there is none at all.

        A damaged one is warned of and left aside where the one before it is intact.

        Raises:
            ValueError: no state is intact, or they belong to something else.
        """
        self._stage = stage
        errors: list[ValueError] = []
        for folder in self._saved_folders():
            try:
                found = self._read(folder)
            except ValueError as error:
                errors.append(error)
                continue
            for damage in errors:
                warnings.warn(f"{damage}; going on from step {found.step} instead", stacklevel=2)
            return found
        if errors:
            raise ValueError(
                f"{errors[0]}; no other state of {stage} is there: remove {self.folder} to start "
                "it anew"
            ) from errors[0]
        if self.log is not None:
            self.log.open()
        return None

    def reached(self, state: State, *, save: bool = False) -> None:
        """The loop is before a step: save its state if it is time to, or stop if it was asked to.

        Its tensors are kept for the next states, so they must not change any more.

        Raises:
            Stopped: the state is saved.
            OSError: it cannot be; the states before it are left as they were.
        """
        state.generators["cpu"] = torch.get_rng_state()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            state.generators["cuda"] = torch.cuda.get_rng_state("cuda")
        now = time.monotonic()
        state.seconds = self.seconds_before + now - self._started
        state.log_size = 0 if self.log is None else self.log.size
        self._before, self._now = self._now, state
        if self._minutes is not None and now - self._minutes_from >= 60 * self._minutes:
            self._asked = self._asked or Stopped(
                f"the {self._minutes:g} minutes are over", TIME_IS_UP
            )
        if save or self._asked is not None or now - self._saved >= self._pause:
            self._write(self._now)
        if self._asked is not None:
            raise self._asked

    def record(self, line: Mapping[str, Any]) -> None:
        """Log what a step found."""
        if self.log is not None:
            self.log.append(line)

    def distrust(self) -> None:
        """The state reached proves to be no good: the one of the step before is the last good."""
        if self._now is not None:
            remove_folder(self._folder_of(self._now.step))
        self._now = self._before

    def clear(self) -> None:
        """Remove all states: what came of them is safe elsewhere."""
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if NAME.fullmatch(entry.name):
                    remove_folder(entry)
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def __enter__(self) -> "Checkpoints":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if isinstance(error, Exception) and self._now is not None:
                try:
                    self._write(self._now)
                except (OSError, ValueError) as other:
                    error.add_note(str(other))
                else:
                    state = self._folder_of(self._now.step)
                    error.add_note(f"the last good state is in {state}")
                if self._asked is not None:  # Ctrl-C reaches a DataLoader's workers as well
                    raise self._asked from error
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            if self.log is not None:
                self.log.close()
        if error is None and self._asked is not None:  # after the last step
            signal.raise_signal(self._signal)

    def _ask(self, number: int, frame: Any) -> None:
        why, code = SIGNALS[number]
        launched = "TORCHELASTIC_RUN_ID" in os.environ
        if self._asked is not None and launched:
            return
        if self._asked is not None:
            raise Stopped(f"{why} at once", code)
        self._asked, self._signal = Stopped(why, code), number
        again = "" if launched else "; interrupt again to stop at once"
        tqdm.write(f"{why}: finishing the step{again}", file=sys.stderr)

    def _saved_folders(self) -> list[FilePath]:
        """The newest first."""
        found = (f for f in self.folder.glob(f"{self._stage}-*") if NAME.fullmatch(f.name))
        return sorted(found, reverse=True)

    def _folder_of(self, step: int) -> FilePath:
        return self.folder / f"{self._stage}-{step:09d}"

    def _write(self, state: State) -> None:
        started, folder = time.monotonic(), self._folder_of(state.step)
        part = folder.with_name(f".{folder.name}{PART}")
        own = {**state.tensors.get("state", {}), "generators": state.generators}
        content: dict[str, Any] = {
            **{"stage": self._stage, "step": state.step, "seconds": state.seconds},
            **{"values": state.values, "of": self.of, "log": None},
        }
        try:
            if self.log is not None:
                self.log.sync()
                sha256 = sha256_of(self.log.file, state.log_size)
                content["log"] = {"bytes": state.log_size, "sha256": sha256}
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for kind, groups in (state.tensors | {"state": own}).items():
                write_tensors(part / f"{kind}.safetensors", kind, groups)
            content["files"] = {file.name: sha256_of(file) for file in sorted(part.iterdir())}
            write_json(part / "state.json", content)
            remove_folder(folder)
            os.replace(part, folder)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise error if error.errno is None else cannot_write(folder, error) from error
        for old in self._saved_folders()[KEPT:]:
            remove_folder(old)
        self._saved = time.monotonic()
        self._pause = max(self.seconds, SHARE * (self._saved - started))

    def _read(self, folder: FilePath) -> State:
        file = folder / "state.json"
        content = read_json(file)
        try:
            step, tensors = content["step"], {}
            if folder != self._folder_of(step):
                raise ValueError(f"{file} is of another stage or step: it was moved here")
            if difference := _difference(content["of"], self.of):
                raise ValueError(f"{folder} belongs to another run: {difference}")
            for name, sha256 in content["files"].items():
                if sha256_of(folder / name) != sha256:
                    raise ValueError(
                        f"cannot read {folder / name}: it was damaged, or is not the one that was "
                        "written here"
                    )
                kind = FilePath(name).stem
                tensors[kind] = read_tensors(folder / name, kind)
            if self.log is not None:
                self.log.open(content["log"])
            self.seconds_before = content["seconds"]
            generators = tensors["state"].pop("generators")
            return State(step, {**tensors}, content["values"], generators)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot read {file}: {error} is missing or wrong") from error


class _Log:
    """JSON Lines that grow by a line a step and can be cut back to where they were."""

    def __init__(self, file: FilePath):
        self.file, self.size = file, 0
        self._stream: BinaryIO | None = None

    def open(self, saved: Mapping[str, Any] | None = None) -> None:
        """An empty file, or what is there, cut back to the bytes that a state tells of.

        Raises:
            ValueError: they are not there any more.
        """
        self.size = saved["bytes"] if saved else 0
        if saved and sha256_of(self.file, self.size) != saved["sha256"]:
            raise ValueError(
                f"{self.file} was damaged: its first {self.size} bytes are not as they were"
            )
        with self._writing():
            self._stream = open(self.file, "r+b" if saved else "wb")
            self._stream.truncate(self.size)
            self._stream.seek(self.size)

    def append(self, line: Mapping[str, Any]) -> None:
        text = f"{json.dumps(line)}\n".encode()
        with self._writing():
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        self.size += len(text)

    def sync(self) -> None:
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the disk is full: said when a line did not fit
            self.sync()
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.file, error) from error


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first difference of two JSON values, in words; empty if there is none."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            found = _difference(there.get(key), here.get(key), str(key))
            if found:
                return found
        return ""
    return "" if there == here else f"{name} is {there} there and {here} here"
