"""The command line: `fastgeo run` and its stages, each usable on what the one before left."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path as FilePath
from typing import Annotated, ClassVar

import torch
import tyro
from tyro.conf import Positional, subcommand

from fastgeo import pipeline
from fastgeo.allocator import keep_pages
from fastgeo.config import (
    PRESETS,
    Config,
    EvaluateConfig,
    MatchConfig,
    OptimizeConfig,
    StepConfig,
    TrainConfig,
    select,
)
from fastgeo.run import Run

BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True, kw_only=True)
class _FromPreset:
    """A command whose defaults are those of a preset."""

    settings: ClassVar[type]

    preset: str = "digits"
    """digits (bundled data, under a minute on a CPU), cifar10, or paper (both for a GPU)"""


@dataclass(frozen=True, kw_only=True)
class _New(_FromPreset):
    """A command that starts a run folder."""

    out: FilePath | None = None
    """run folder; runs/PRESET by default"""
    overwrite: bool = False
    """replace the run that the folder holds"""

    def create(self) -> Run:
        config = replace(PRESETS[self.preset], **select(self, self.settings))
        folder = self.out or FilePath("runs") / self.preset
        return Run.create(folder, config, overwrite=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class _Existing:
    """A command that does a stage in a run folder."""

    settings: ClassVar[type | None] = None

    folder: Positional[FilePath]
    """run folder"""
    overwrite: bool = False
    """replace this stage's files, and drop what later stages made of them"""

    def redo(self, stage: str) -> Run:
        changes = select(self, self.settings) if self.settings else {}
        return Run.open(self.folder).redo(stage, overwrite=self.overwrite, **changes)


@dataclass(frozen=True, kw_only=True)
class RunCommand(Config, _New):
    """Train two networks, match them, find the geodesic between them, and report."""

    settings = Config

    def __post_init__(self) -> None:
        """Checked as a Config in `create`: an error here would reach the user in tyro's frame."""

    def __call__(self) -> None:
        run = self.create()
        print(f"\n{pipeline.run_all(run)}\nReport, figures and weights: {run.folder}")


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig, _New):
    """Train the ends in one stacked pass, or take their weights from files; starts a run folder."""

    settings = TrainConfig

    def __call__(self) -> None:
        run = self.create()
        pipeline.train(run)
        print(f"{run.file('ends.safetensors')}; next: {run.again('match')}")


@dataclass(frozen=True, kw_only=True)
class MatchCommand(_Existing, MatchConfig):
    """Permute end b towards end a; needs `fastgeo train`."""

    settings = MatchConfig

    def __call__(self) -> None:
        run = self.redo("match")
        pipeline.match_ends(run)
        found = run.stages["match"]
        print(
            f"inner product with a: {found['objective_before']:.2f} before, "
            f"{found['objective_after']:.2f} after {found['sweeps']} sweeps\n"
            f"{run.file('matching.md')}, {run.file('matched.safetensors')}; "
            f"next: {run.again('optimize')}"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizeCommand(_Existing, OptimizeConfig):
    """Optimise the path from a to the matched b; needs `fastgeo match`."""

    settings = OptimizeConfig

    def __call__(self) -> None:
        run = self.redo("optimize")
        pipeline.optimize_path(run)
        print(f"{run.file('path.safetensors')}; next: {run.again('evaluate')}")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(_Existing, EvaluateConfig):
    """Evaluate the line, the matched line and the geodesic; needs `fastgeo optimize`."""

    settings = EvaluateConfig

    def __call__(self) -> None:
        run = self.redo("evaluate")
        pipeline.evaluate_paths(run)
        print(f"{run.file('report.json')}; next: {run.again('plot')}")


@dataclass(frozen=True, kw_only=True)
class PlotCommand(_Existing):
    """Draw the figures and write report.md; needs `fastgeo evaluate`."""

    def __call__(self) -> None:
        run = self.redo("plot")
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
    """Entry point; exits with 0, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        keep_pages()
        _command(argv)()
    except (ValueError, OSError) as error:
        _complain(f"fastgeo: {error}", error)
        sys.exit(BAD_INPUT)
    except torch.OutOfMemoryError as error:
        _complain("fastgeo: out of memory; lower batch-size, eval-batch-size or points", error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as error:
        _complain("\nfastgeo: interrupted", error)
        sys.exit(INTERRUPTED)


def _command(argv: list[str]) -> _FromPreset | _Existing:
    """The command, its defaults those of the preset or of the run folder that it names."""
    preset = _preset(argv)
    command = _parse(argv, preset, PRESETS[preset])
    if isinstance(command, _Existing) and command.settings:
        command = _parse(argv, preset, Run.open(command.folder).config)
    return command


def _parse(argv: list[str], preset: str, defaults: Config) -> _FromPreset | _Existing:
    choices = []
    for name, command in COMMANDS.items():
        own = {"preset": preset} if issubclass(command, _FromPreset) else {"folder": tyro.MISSING}
        values = select(defaults, command.settings) if command.settings else {}
        choices.append(Annotated[command, subcommand(name, default=command(**own, **values))])
    return tyro.cli(reduce(or_, choices), args=argv, prog="fastgeo", description=__doc__)


def _preset(argv: list[str]) -> str:
    """The value of --preset, which decides all other defaults, so it is read first."""
    for i, word in enumerate(argv):
        if word == "--preset" or word.startswith("--preset="):
            name = word.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
            if name not in PRESETS:
                raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
            return name
    return "digits"


def _complain(sentence: str, error: BaseException) -> None:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    print(sentence + notes, file=sys.stderr)


if __name__ == "__main__":
    main()
