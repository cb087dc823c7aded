"""Where a loop is, on disk: what it takes to go on to the last bit after any end of the process.

    FOLDER/STAGE-STEP/state.json            the step, what the state belongs to, checksums
                      state.safetensors     generators, order of the data, momentum
                      path.safetensors      the path, or ends.safetensors: the networks

A state is complete or absent, and the two newest are kept.
"""

import json
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgeo.store.files import (
    PART,
    cannot_write,
    read_json,
    read_tensors,
    remove_folder,
    sync_folder,
    write_json,
    write_tensors,
)
from fastgeo.store.step_log import StepLog

Groups = Mapping[str, Mapping[str, Tensor]]
KEPT = 2
NAME = re.compile(r"\.?[a-z]+-\d{9}(\.old)?(\.part)?")  # of a state's folder
SHARE = 20  # times as long as saving took, at least, to the next time
INTERRUPTED, TERMINATED, TIME_IS_UP = 130, 143, 75  # exit codes; the last is sysexits' EX_TEMPFAIL


SIGNALS = {
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
    """

    step: int
    tensors: dict[str, Groups]
    values: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, Tensor] = field(default_factory=dict)

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
    `Stopped`; a second one stops it at once. Any other error leaves the last good state there.

    Args:
        folder: made when it is first needed.
        seconds: between two states. More where saving takes more than a twentieth of the time.
        max_minutes: the loop stops with its state saved once so many have passed.
        of: what the states belong to, as JSON; states of anything else are refused.
        before: entries of `of` for states from before there were these.
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
        before: Mapping[str, Any] | None = None,
        log: str | os.PathLike | None = None,
        started: float | None = None,
    ):
        self.folder, self.seconds = FilePath(folder), seconds
        self.of = json.loads(json.dumps(of or {}))
        self.before = dict(before or {})
        self.log = None if log is None else StepLog(FilePath(log))
        self.seconds_before = 0.0  # that earlier processes spent on the states gone on from
        self._started = self._saved = time.monotonic()
        self._minutes, self._minutes_from = max_minutes, started or self._started
        self._pause = seconds
        self._stage = ""
        self._now: _Reached | None = None
        self._before: _Reached | None = None
        self._asked: Stopped | None = None
        self._handlers: dict[int, Any] = {}

    def load(self, stage: str) -> State | None:
        """The newest state of a stage that is intact; None if there is none at all.

        A damaged one is warned of and left aside where the one before it is intact.

        Raises:
            ValueError: no state is intact, or they belong to something else.
        """
        self._stage, found, errors = stage, None, []
        for folder in self._saved_folders():
            try:
                found = self._read(folder)
                break
            except ValueError as error:
                errors.append(error)
        if errors and found is None:
            raise ValueError(
                f"{errors[0]}; no other state of {stage} is there: remove {self.folder} to start "
                "it anew"
            ) from errors[0]
        for error in errors:
            warnings.warn(f"{error}; going on from step {found.step} instead", stacklevel=2)
        if self.log is not None and found is None:
            self.log.start()
        return found

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
        mark = None if self.log is None else self.log.mark()
        self._before, self._now = self._now, _Reached(state, mark, self._spent())
        now = time.monotonic()
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
            remove_folder(self._folder_of(self._now.state.step))
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
                except OSError as other:
                    error.add_note(str(other))
                else:
                    state = self._folder_of(self._now.state.step)
                    error.add_note(f"the last good state is in {state}")
                if self._asked is not None:  # Ctrl-C reaches a DataLoader's workers as well
                    raise self._asked from error
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            if self.log is not None:
                self.log.close()

    def _ask(self, number: int, frame: Any) -> None:
        why, code = SIGNALS[number]
        if self._asked is not None:
            raise Stopped(f"{why} at once", code)
        self._asked = Stopped(why, code)
        tqdm.write(f"{why}: finishing the step; once more to stop at once", file=sys.stderr)

    def _spent(self) -> float:
        return self.seconds_before + time.monotonic() - self._started

    def _saved_folders(self) -> list[FilePath]:
        """The newest first."""
        found = (f for f in self.folder.glob(f"{self._stage}-*") if NAME.fullmatch(f.name))
        return sorted(found, reverse=True)

    def _folder_of(self, step: int) -> FilePath:
        return self.folder / f"{self._stage}-{step:09d}"

    def _write(self, reached: "_Reached") -> None:
        started, state = time.monotonic(), reached.state
        folder = self._folder_of(state.step)
        part = folder.with_name(f".{folder.name}{PART}")
        tensors = state.tensors
        tensors = tensors | {"state": {**tensors.get("state", {}), "generators": state.generators}}
        content = {
            "stage": self._stage,
            "step": state.step,
            "seconds": reached.seconds,
            "values": state.values,
            "log": reached.mark,
            "of": self.of,
        }
        try:
            if self.log is not None:
                self.log.sync()
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            content["files"] = {
                kind: write_tensors(part / f"{kind}.safetensors", kind, groups)
                for kind, groups in tensors.items()
            }
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
            if difference := _difference({**self.before, **content["of"]}, self.of):
                raise ValueError(f"{folder} belongs to another run: {difference}")
            for kind, checksum in content["files"].items():
                named = folder / f"{kind}.safetensors"
                tensors[kind] = read_tensors(named, kind, checksum=checksum)
            if self.log is not None:
                self.log.cut(content["log"])
            self.seconds_before = content["seconds"]
            generators = tensors["state"].pop("generators")
            return State(step, tensors, content["values"], generators)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"cannot read {file}: {error} is missing or wrong") from error


@dataclass
class _Reached:
    state: State
    mark: dict[str, Any] | None
    seconds: float


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first difference of two JSON values, in words; empty if there is none."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            found = _difference(there.get(key), here.get(key), str(key))
            if found:
                return found
        return ""
    return "" if there == here else f"{name} is {there} there and {here} here"
