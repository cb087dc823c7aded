"""The command line: `fastgeo run` and its stages, each usable on what the one before left."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path as FilePath
from typing import Annotated

import tyro
from tyro.conf import Positional, subcommand

from fastgeo.config import (
    PRESETS,
    Config,
    EvaluateConfig,
    MatchConfig,
    OptimizeConfig,
    TrainConfig,
    select,
)

BAD_INPUT, INTERRUPTED = 2, 130


@dataclass(frozen=True, kw_only=True)
class _New:
    preset: str = "digits"
    """digits (bundled data, under a minute on a CPU), cifar10, or paper (both for a GPU)"""
    out: FilePath | None = None
    """run folder; runs/PRESET by default"""
    overwrite: bool = False
    """replace the run that the folder holds"""

    def create(self, config: Config):
        from fastgeo.pipeline import Run

        return Run.create(
            self.out or FilePath("runs") / self.preset, config, overwrite=self.overwrite
        )


@dataclass(frozen=True, kw_only=True)
class RunCommand(Config, _New):
    """Train two networks, match them, find the geodesic between them, and report."""

    def __post_init__(self) -> None:
        """Checked as a Config in __call__: an error here would reach the user in tyro's frame."""

    def __call__(self) -> None:
        from fastgeo import pipeline

        run = self.create(Config(**select(self, Config)))
        print(f"\n{pipeline.run_all(run)}\nReport, figures and weights: {run.folder}")


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainConfig, _New):
    """Train both ends in one stacked pass; starts a run folder."""

    device: str = "auto"
    """auto (cuda where there is one), cpu, cuda, cuda:1, ..."""

    def __call__(self) -> None:
        from fastgeo import pipeline

        changes = select(self, TrainConfig) | {"device": self.device}
        run = self.create(replace(PRESETS[self.preset], **changes))
        pipeline.train(run)
        print(f"{run.file('ends.safetensors')}; next: fastgeo match {run.folder}")


@dataclass(frozen=True, kw_only=True)
class _Existing:
    folder: Positional[FilePath]
    """run folder"""
    overwrite: bool = False
    """replace this stage's files, and drop what later stages made of them"""

    def again(self, stage: str, part: type | None = None):
        from fastgeo.pipeline import Run

        changes = select(self, part) if part else {}
        return Run.open(self.folder).again(stage, overwrite=self.overwrite, **changes)


@dataclass(frozen=True, kw_only=True)
class MatchCommand(MatchConfig, _Existing):
    """Permute end b towards end a; needs `fastgeo train`."""

    def __call__(self) -> None:
        from fastgeo import pipeline

        run = self.again("match", MatchConfig)
        pipeline.match_ends(run)
        found = run.stages["match"]
        print(
            f"inner product with a: {found['objective_before']:.2f} before, "
            f"{found['objective_after']:.2f} after {found['sweeps']} sweeps; "
            f"next: fastgeo optimize {run.folder}"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizeCommand(OptimizeConfig, _Existing):
    """Optimise the path from a to the matched b; needs `fastgeo match`."""

    def __call__(self) -> None:
        from fastgeo import pipeline

        run = self.again("optimize", OptimizeConfig)
        pipeline.optimize_path(run)
        print(f"{run.file('path.safetensors')}; next: fastgeo evaluate {run.folder}")


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(EvaluateConfig, _Existing):
    """Evaluate the line, the matched line and the geodesic; needs `fastgeo optimize`."""

    def __call__(self) -> None:
        from fastgeo import pipeline

        run = self.again("evaluate", EvaluateConfig)
        pipeline.evaluate_paths(run)
        print(f"{run.file('report.json')}; next: fastgeo plot {run.folder}")


@dataclass(frozen=True, kw_only=True)
class PlotCommand(_Existing):
    """Draw the figures and write report.md; needs `fastgeo evaluate`."""

    def __call__(self) -> None:
        from fastgeo import pipeline

        run = self.again("plot")
        print(f"\n{pipeline.plot_report(run)}\nReport and figures: {run.folder}")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with 0, 2 for bad input, 130 when interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        command = _parse(argv)
        from fastgeo.allocator import keep_pages

        keep_pages()
        command()
    except (ValueError, OSError) as error:
        _complain(f"fastgeo: {error}", error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as error:
        _complain("\nfastgeo: interrupted; finished stages are kept", error)
        sys.exit(INTERRUPTED)


def _parse(argv: list[str]):
    """The command, its defaults taken from the preset or the run folder it names."""
    preset = _preset(argv)
    settings = asdict(PRESETS[preset])
    if len(argv) > 1 and argv[0] in ("match", "optimize", "evaluate") and argv[1][0] != "-":
        from fastgeo.pipeline import Run

        settings = asdict(Run.open(FilePath(argv[1])).config)

    def default(command: type, part: type, **own):
        return command(**own, **select(Config(**settings), part))

    new, old = {"preset": preset}, {"folder": tyro.MISSING}
    train = {**new, "device": settings["device"]}
    commands = (
        Annotated[RunCommand, subcommand("run", default=default(RunCommand, Config, **new))]
        | Annotated[
            TrainCommand, subcommand("train", default=default(TrainCommand, TrainConfig, **train))
        ]
        | Annotated[
            MatchCommand, subcommand("match", default=default(MatchCommand, MatchConfig, **old))
        ]
        | Annotated[
            OptimizeCommand,
            subcommand("optimize", default=default(OptimizeCommand, OptimizeConfig, **old)),
        ]
        | Annotated[
            EvaluateCommand,
            subcommand("evaluate", default=default(EvaluateCommand, EvaluateConfig, **old)),
        ]
        | Annotated[PlotCommand, subcommand("plot")]
    )
    return tyro.cli(commands, args=argv, prog="fastgeo", description=__doc__)


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
