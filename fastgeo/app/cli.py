"""The command line: `fastgeo run` and its stages, each usable on what the one before left."""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path as FilePath
from typing import Annotated, ClassVar

import torch
import tyro
from tyro.conf import Positional, subcommand

from fastgeo.app import stages as pipeline
from fastgeo.app.config import (
    PRESETS,
    Config,
    EvaluateConfig,
    MatchConfig,
    OptimizeConfig,
    StepConfig,
    TrainConfig,
    select,
)
from fastgeo.app.folder import Run
from fastgeo.step.allocator import keep_pages
from fastgeo.store.checkpoint import INTERRUPTED, TERMINATED, Stopped

BAD_INPUT = 2


@dataclass(frozen=True, kw_only=True)
class _Long:
    """A command that may be stopped and gone on with."""

    resume: bool = False
    """go on where the run was stopped or killed, with its own settings; start it if it was not"""
    checkpoint_seconds: float = 60.0
    """between two states saved for that; more where saving takes a twentieth of the time"""
    max_minutes: float | None = None
    """stop with the state saved after so many, with exit code 75; --resume goes on"""

    def pace(self) -> dict[str, float]:
        """ValueError for times that cannot be meant."""
        if not self.checkpoint_seconds >= 0:
            raise ValueError(
                f"checkpoint-seconds must not be negative, got {self.checkpoint_seconds}"
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"max-minutes must be positive, got {self.max_minutes}")
        started = time.monotonic()
        return dict(seconds=self.checkpoint_seconds, max_minutes=self.max_minutes, started=started)


@dataclass(frozen=True, kw_only=True)
class _FromPreset:
    """A command whose defaults are those of a preset."""

    settings: ClassVar[type]

    preset: str = "digits"
    """digits (bundled data, under a minute on a CPU), paper-small (1,000 images of CIFAR-10, for a
    CPU), cifar10, or paper (both for a GPU)"""


@dataclass(frozen=True, kw_only=True)
class _New(_Long, _FromPreset):
    """A command that starts a run folder."""

    out: FilePath | None = None
    """run folder; runs/PRESET by default"""
    overwrite: bool = False
    """replace the run that the folder holds"""

    @property
    def folder(self) -> FilePath:
        return self.out or FilePath("runs") / self.preset

    @property
    def goes_on(self) -> bool:
        """Whether there is a run to go on with."""
        return self.resume and (self.folder / "config.json").exists()

    def __call__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on and --overwrite begins anew; give one of them")
        pace = self.pace()
        if self.goes_on:
            run = Run.open(self.folder)
            run.resume(replace(run.config, **select(self, self.settings)))
        else:
            config = replace(PRESETS[self.preset], **select(self, self.settings))
            run = Run.create(self.folder, config, overwrite=self.overwrite)
        run.pace = pace
        with run:
            self.do(run)


@dataclass(frozen=True, kw_only=True)
class _Existing:
    """A command that does a stage in a run folder."""

    stage: ClassVar[str]
    settings: ClassVar[type | None] = None

    folder: Positional[FilePath]
    """run folder"""
    overwrite: bool = False
    """replace this stage's files, and drop what later stages made of them"""

    def __call__(self) -> None:
        with self.redo() as run:
            self.do(run)

    def redo(self, **options: bool) -> Run:
        changes = select(self, self.settings) if self.settings else {}
        run = Run.open(self.folder)
        return run.redo(self.stage, overwrite=self.overwrite, **options, **changes)


@dataclass(frozen=True, kw_only=True)
class _LongExisting(_Long, _Existing):
    def __call__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on and --overwrite begins anew; give one of them")
        pace = self.pace()
        with self.redo(resume=self.resume) as run:
            run.pace = pace
            if self.stage in run.stages:
                print(f"{self.stage} is finished in {run.folder}")
            else:
                self.do(run)


@dataclass(frozen=True, kw_only=True)
class RunCommand(Config, _New):
    """Train two networks, match them, find the geodesic between them, and report."""

    settings = Config

    def __post_init__(self) -> None:
        """Checked as a Config in `create`: an error here would reach the user in tyro's frame."""

    def do(self, run: Run) -> None:
        print(f"\n{pipeline.run_all(run)}\nReport, figures and weights: {run.folder}")


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig, _New):
    """Train the ends in one stacked pass, or take their weights from files; starts a run folder."""

    settings = TrainConfig

    def do(self, run: Run) -> None:
        if "train" not in run.stages:
            pipeline.train(run)
        print(f"{run.file('ends.safetensors')}; next: {run.again('match')}")


@dataclass(frozen=True, kw_only=True)
class MatchCommand(_Existing, MatchConfig):
    """Permute end b towards end a; needs `fastgeo train`."""

    stage = "match"
    settings = MatchConfig

    def do(self, run: Run) -> None:
        pipeline.match_ends(run)
        found = run.stages["match"]
        print(
            f"inner product with a: {found['objective_before']:.2f} before, "
            f"{found['objective_after']:.2f} after {found['sweeps']} sweeps\n"
            f"{run.file('matching.md')}, {run.file('matched.safetensors')}; "
            f"next: {run.again('optimize')}"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizeCommand(_LongExisting, OptimizeConfig):
    """Optimise the path from a to the matched b; needs `fastgeo match`."""

    stage = "optimize"
    settings = OptimizeConfig

    def do(self, run: Run) -> None:
        pipeline.optimize_path(run)
        print(f"{run.file('path.safetensors')}; next: {run.again('evaluate')}")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(_LongExisting, EvaluateConfig):
    """Evaluate the line, the matched line and the geodesic; needs `fastgeo optimize`."""

    stage = "evaluate"
    settings = EvaluateConfig

    def do(self, run: Run) -> None:
        pipeline.evaluate_paths(run)
        print(f"{run.file('report.json')}; next: {run.again('plot')}")


@dataclass(frozen=True, kw_only=True)
class PlotCommand(_Existing):
    """Draw the figures and write report.md; needs `fastgeo evaluate`."""

    stage = "plot"

    def do(self, run: Run) -> None:
        print(f"\n{pipeline.plot_report(run)}\nReport and figures: {run.folder}")


@dataclass(frozen=True, kw_only=True)
class ProfileCommand(StepConfig, _FromPreset):
    """Measure the optimisation step beside what people set up instead; needs no run folder."""

    settings = StepConfig

    repeats: int = 5
    """measurements of each implementation, which take turns"""
    compiled: bool = True
    """also the loop over compiled modules, which takes a while to compile"""
    trace: FilePath | None = None
    """write a trace of some steps here, for chrome://tracing or ui.perfetto.dev"""
    json: FilePath | None = None
    """write the rows here, for python -m benchmarks.compare"""

    def __call__(self) -> None:
        config = replace(PRESETS[self.preset], **select(self, self.settings))
        how = dict(repeats=self.repeats, compiled=self.compiled, trace=self.trace)
        pipeline.profile(Run(FilePath(), config), rows_file=self.json, **how)


COMMANDS = {
    "run": RunCommand,
    "train": TrainCommand,
    "match": MatchCommand,
    "optimize": OptimizeCommand,
    "evaluate": EvaluateCommand,
    "plot": PlotCommand,
    "profile": ProfileCommand,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Exits with 0; 2 for bad input and what cannot be read or written; 75 when its minutes are over;
    130 when interrupted; 143 when terminated.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if on_main_thread else None
    try:
        keep_pages()
        _command(argv)()
    except (ValueError, OSError) as error:
        _complain(f"fastgeo: {_sentence(error)}", error)
        sys.exit(BAD_INPUT)
    except torch.OutOfMemoryError as error:
        _complain("fastgeo: out of memory; lower batch-size, eval-batch-size or points", error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as error:
        _complain(f"\nfastgeo: {error if str(error) else 'interrupted'}", error)
        sys.exit(getattr(error, "exit_code", INTERRUPTED))
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: object) -> None:
    """SIGTERM where there is no step to finish."""
    raise Stopped("terminated", TERMINATED)


def _command(argv: list[str]) -> _FromPreset | _Existing:
    """The command, its defaults those of the preset or of the run folder that it names."""
    preset = _preset(argv) or "digits"
    command = _parse(argv, preset, PRESETS[preset])
    existing = isinstance(command, _Existing) and command.settings
    # A preset that is named says what the settings are to be, also with --resume.
    if existing or (isinstance(command, _New) and command.goes_on and not _preset(argv)):
        command = _parse(argv, preset, Run.open(command.folder).config)
    return command


def _parse(argv: list[str], preset: str, defaults: Config) -> _FromPreset | _Existing:
    choices = []
    for name, command in COMMANDS.items():
        own = {"preset": preset} if issubclass(command, _FromPreset) else {"folder": tyro.MISSING}
        values = select(defaults, command.settings) if command.settings else {}
        choices.append(Annotated[command, subcommand(name, default=command(**own, **values))])
    return tyro.cli(reduce(or_, choices), args=argv, prog="fastgeo", description=__doc__)


def _preset(argv: list[str]) -> str | None:
    """The value of --preset, which decides all other defaults, so it is read first."""
    for i, word in enumerate(argv):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            if name not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
            return name
    return None


def _sentence(error: ValueError | OSError) -> str:
    reason, file = getattr(error, "strerror", None), getattr(error, "filename", None)
    return f"{file}: {reason}" if reason and file else str(error)


def _complain(sentence: str, error: BaseException) -> None:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    print(sentence + notes, file=sys.stderr)


if __name__ == "__main__":
    main()
