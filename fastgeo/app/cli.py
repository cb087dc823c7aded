"""fastgeo run does everything. Each of its stages is a command, too, which works on what the stage
before it left in the run folder. fastgeo COMMAND --help lists the settings of a command, and
fastgeo --version prints the version.

Where several processes share a machine, set OMP_NUM_THREADS=1, or they slow each other down.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TextIO, get_args, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

import fastgeo
from fastgeo.app.config import (
    PRESETS,
    Config,
    Drawing,
    Format,
    Pace,
    about,
    chosen,
    flag,
    meanings,
)
from fastgeo.schedule import within

if TYPE_CHECKING:  # torch takes seconds to import, and help needs none of it
    from fastgeo.app.folder import Run

BAD_INPUT, INTERRUPTED, BROKEN_PIPE, TERMINATED = 2, 130, 141, 143
INTERVAL = 10.0  # seconds between two lines of progress where there is no terminal
Method = Literal["geodesic", "bezier", "polychain"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the command line asks for.

    Attributes:
        config: all settings, those of a preset or of a run but for what is asked for.
    """

    takes: ClassVar[tuple[str, ...]] = tuple(one.name for one in fields(Config))
    """attributes of Config that can be asked for"""
    lacks: ClassVar[tuple[str, ...]] = ()
    """attributes of its own that cannot"""

    config: Config

    def __call__(self) -> None:
        raise NotImplementedError

    @property
    def there(self) -> FilePath | None:
        """The folder of a run whose settings are the defaults."""
        return None

    @property
    def along(self) -> int | None:
        """How many processes of torchrun are along the path, if that is said."""
        return None


@dataclass(frozen=True, kw_only=True)
class _OnRanks(Command):
    """A command that takes steps on a path, and may do so on several processes.

    Attributes:
        ranks_path: of the processes that torchrun started, how many hold parts of the path; the
            others share the batch. As many as it has points for by default
    """

    ranks_path: int | None = None

    @property
    def along(self) -> int | None:
        within(1, ranks_path=self.ranks_path or 1)
        return self.ranks_path


@dataclass(frozen=True, kw_only=True)
class _Stage(Command):
    """A command that works in a run folder.

    Attributes:
        overwrite: replace what is there, and remove what later stages made of it
        resume: go on where the run was stopped or killed, with its own settings; start it if it was
            not started yet
        quiet: show no progress
        pace: when a long command saves its state and stops, and what it logs
        drawing: how figures are drawn
    """

    overwrite: bool = False
    resume: bool = False
    quiet: bool = False
    pace: Pace = Pace()
    drawing: Drawing = Drawing()

    def opened(self) -> "contextlib.AbstractContextManager[Run]":
        raise NotImplementedError

    def do(self, run: "Run") -> str:
        """Do the work, and return what to say after it."""
        raise NotImplementedError

    def __call__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("--resume goes on and --overwrite begins anew; give one of them")
        from fastgeo.app.company import noted

        with self.opened() as run, noted(run):
            run.pace, run.quiet, run.drawing = self.pace, self.quiet, self.drawing
            _say_if_busy()
            print(self.do(run))


@dataclass(frozen=True, kw_only=True)
class _New(_Stage):
    """A command that starts a run folder.

    Attributes:
        preset: whose settings are the defaults: digits (bundled data, under a minute on a CPU),
            text (sources of Python's standard library, some minutes on a CPU), paper-small (1,000
            images of CIFAR-10, for a CPU), cifar10 or paper (both for a GPU)
        out: run folder; runs/PRESET by default
    """

    preset: str
    out: FilePath | None = None

    @property
    def folder(self) -> FilePath:
        return self.out or FilePath("runs") / self.preset

    @property
    def there(self) -> FilePath | None:
        return self.folder if self.resume and (self.folder / "config.json").exists() else None

    def opened(self) -> "contextlib.AbstractContextManager[Run]":
        from fastgeo.app.folder import Run

        if self.there:
            return Run.resume(self.folder, self.config)
        return Run.create(self.folder, self.config, overwrite=self.overwrite)


@dataclass(frozen=True, kw_only=True)
class RunCommand(_OnRanks, _New):
    """Train two networks, match them, find the geodesic or a curve between them, and report.

    Attributes:
        method: geodesic: all points move (paper); bezier or polychain: a curve of one control
            point, evaluated at 3 random places in a step, which takes more steps and, of a bezier,
            is shorter at the same cost. It sets curve, controls, objective and nodes, each of which
            can also be set by itself, and the steps and rate that the preset has for it
    """

    method: Method

    def do(self, run: "Run") -> str:
        from fastgeo.app.stages import run_all

        return f"\n{run_all(run)}\nReport, figures and weights: {run.folder}"


@dataclass(frozen=True, kw_only=True)
class TrainCommand(_New):
    """Start a run folder: train the two ends together, or take their weights from files."""

    takes, lacks = ("device", "data", "ends", "training", "forward"), ("drawing",)

    def do(self, run: "Run") -> str:
        from fastgeo.app.stages import train

        if "train" not in run.stages:
            train(run)
        return run.next_after("train")


@dataclass(frozen=True, kw_only=True)
class _Existing(_Stage):
    """A command that does a stage in a run folder.

    Attributes:
        folder: run folder
    """

    stage: ClassVar[str]
    lacks: ClassVar[tuple[str, ...]] = ("drawing",)

    folder: Positional[FilePath]

    @property
    def there(self) -> FilePath | None:
        return self.folder

    def opened(self) -> "contextlib.AbstractContextManager[Run]":
        from fastgeo.app.folder import Run

        how = dict(overwrite=self.overwrite, resume=self.resume)
        return Run.redo(self.folder, self.stage, self.config, **how)

    def do(self, run: "Run") -> str:
        from fastgeo.app.stages import DO

        if self.stage in run.stages:
            return f"{self.stage} is finished in {run.folder}"
        DO[self.stage](run)
        return self.done(run)

    def done(self, run: "Run") -> str:
        return run.next_after(self.stage)


@dataclass(frozen=True, kw_only=True)
class MatchCommand(_Existing):
    """Permute the channels of end b to resemble end a's; needs `fastgeo train`."""

    stage, takes = "match", ("device", "matching")
    lacks = ("resume", "pace", "drawing")

    def done(self, run: "Run") -> str:
        from fastgeo.app.report import counted

        found = run.stages["match"]
        return (
            f"inner product of the parameters of a and b: {found['objective_before']:.2f} before, "
            f"{found['objective_after']:.2f} after {counted(found['sweeps'], 'sweep')}\n"
            f"{run.file('matching.md')}, {run.file('matched.safetensors')}; "
            f"next: {run.again('optimize')}"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizeCommand(_OnRanks, _Existing):
    """Optimise the path from a to the matched b; needs `fastgeo match`.

    Attributes:
        method: geodesic, bezier or polychain: sets curve, controls, objective and nodes
    """

    stage, takes = "optimize", ("device", "path", "descent", "forward")

    method: Method


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(_Existing):
    """Evaluate the line, the matched line and the optimised path; needs `fastgeo optimize`."""

    stage, takes = "evaluate", ("device", "forward", "evaluation")


@dataclass(frozen=True, kw_only=True)
class PlotCommand(_Existing):
    """Write report.md and draw its figures, in place of earlier ones; needs `fastgeo evaluate`."""

    stage, takes, lacks = "plot", (), ("resume", "pace")

    overwrite: bool = True

    def done(self, run: "Run") -> str:
        return f"\n{run.summary()}\nReport and figures: {run.folder}"


@dataclass(frozen=True, kw_only=True)
class PlaneCommand(_Existing):
    """Draw the loss over the plane through a path's ends and middle; needs `fastgeo evaluate`.

    Attributes:
        size: networks along each side of the grid
        split: whose loss: that of the train or the test images
    """

    takes, lacks = (), ("overwrite", "resume", "pace")

    size: int = 21
    split: Literal["train", "test"] = "train"

    def __post_init__(self) -> None:
        within(3, size=self.size)

    def opened(self) -> "contextlib.AbstractContextManager[Run]":
        from fastgeo.app.folder import Run

        return Run.evaluated(self.folder)

    def do(self, run: "Run") -> str:
        from fastgeo.app.stages import find_plane

        return f"{find_plane(run, self.size, self.split)}\n{run.file('plane.png')}"


@dataclass(frozen=True, kw_only=True)
class StatusCommand(Command):
    """Say how a run on several processes ended, and exit as it did, which torchrun does not.

    Attributes:
        folder: run folder
    """

    takes = ()

    folder: Positional[FilePath]

    def __call__(self) -> None:
        from fastgeo.app.company import status

        why, exit_code = status(self.folder)
        print(why)
        sys.exit(exit_code)


@dataclass(frozen=True, kw_only=True)
class CompareCommand(Command):
    """Compare runs in one table and one figure.

    Attributes:
        runs: run folders
        path: which path of every run; optimised: its geodesic, bezier or polychain
        figure: file of the figure, a .png, .pdf or .svg
        dpi: dots per inch of a png
        title: what stands above the figure; what the paths are by default
    """

    takes = ()

    runs: Positional[tuple[FilePath, ...]]
    path: Literal["optimised", "matched", "linear"] = "optimised"
    figure: FilePath = FilePath("comparison.png")
    dpi: int = 300
    title: str | None = None

    def __post_init__(self) -> None:
        if self.figure.suffix.removeprefix(".") not in get_args(Format):
            raise ValueError(f"--figure must end with .png, .pdf or .svg, got {self.figure}")
        within(10, 2400, dpi=self.dpi)

    def __call__(self) -> None:
        from fastgeo.figures import COMPARED, compare, write_figure

        found = compare(self.runs, path=self.path)
        figure = found.plot(title=COMPARED[self.path] if self.title is None else self.title)
        write_figure(self.figure, figure, dpi=self.dpi)
        print(f"{found.table()}\n\n{self.figure}")


@dataclass(frozen=True, kw_only=True)
class ProfileCommand(_OnRanks):
    """Time an optimisation step against the loops people write instead; needs no run folder.
    On several processes, say where the time of their common step goes.

    Attributes:
        preset: whose settings are the defaults: digits, text, paper-small, cifar10 or paper
        repeats: how often each implementation is measured; they take turns
        compiled: also measure the loop over compiled modules, which take a while to compile
        trace: file for a trace of some steps, to open in chrome://tracing or ui.perfetto.dev
        json: file for the rows of the table, which python -m benchmarks.compare reads
    """

    takes = ("device", "data", "ends", "path", "descent", "forward")

    preset: str
    repeats: int = 5
    compiled: bool = True
    trace: FilePath | None = None
    json: FilePath | None = None

    def __call__(self) -> None:
        from fastgeo.app.stages import profile

        with _said_once():
            profile(
                self.config,
                repeats=self.repeats,
                compiled=self.compiled,
                trace=self.trace,
                rows_file=self.json,
            )


@dataclass(frozen=True, kw_only=True)
class _First:
    """What is looked for before all else.

    Attributes:
        preset: whose settings are the defaults
        method: whose curve, objective and nodes are
        version: print the version
    """

    preset: str | None = None
    method: str | None = None
    version: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point.

    Exits with 0; with 2 for bad input and files that cannot be read or written, 75 when its minutes
    are over, 130 when interrupted, 141 when nobody reads its output, 143 when terminated.
    """
    with (
        _silent_if_nobody_reads(),
        _terminable(),
        _errors_as_sentences(),
        _warnings_as_sentences(),
        _progress_by_lines(),
    ):
        _wait_without_spinning()
        with _said_once():
            command = _command(list(sys.argv[1:] if argv is None else argv))
        from fastgeo_kernels import keep_pages

        keep_pages()
        if _launched():
            from fastgeo.app.company import together

            together(command, along=command.along, alike=isinstance(command, ProfileCommand))
        elif command.along is not None:
            raise ValueError("--ranks-path is for several processes, which torchrun starts")
        else:
            command()


def _launched() -> bool:
    """Whether torchrun started this process beside others."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def _follows() -> bool:
    """Whether another of those is the first."""
    return _launched() and os.environ["RANK"] != "0"


@contextlib.contextmanager
def _said_once() -> Iterator[None]:
    """What all processes of torchrun would say is said by the first alone."""
    with contextlib.ExitStack() as stack:
        if _follows():
            nothing = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nothing))
            stack.enter_context(contextlib.redirect_stderr(nothing))
            stack.enter_context(_errors_as_sentences())
        yield


@contextlib.contextmanager
def _errors_as_sentences() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, _Refused) as error:
        _complain(f"fastgeo: {_sentence(error)}", error)
        sys.exit(BAD_INPUT)
    except RuntimeError as error:
        sentence = {  # of classes that are not imported here
            "OutOfMemoryError": "out of memory; lower batch-size, eval-batch-size or points",
            "OtherRank": str(error),
        }
        names = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in sentence]
        if not names:
            raise
        _complain(f"fastgeo: {sentence[names[0]]}", error)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt as error:
        _complain(f"\nfastgeo: {error if str(error) else 'interrupted'}", error)
        sys.exit(getattr(error, "exit_code", INTERRUPTED))


@contextlib.contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Warnings without the line of code that gives them, which a command's user does not know."""
    before: Any = warnings.formatwarning

    def sentence(message: Warning | str, category: type[Warning], *place: Any) -> str:
        if category is not UserWarning:
            return before(message, category, *place)
        return f"fastgeo: warning: {_in_flags(str(message))}\n"

    warnings.formatwarning = sentence  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextlib.contextmanager
def _silent_if_nobody_reads() -> Iterator[None]:
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there
        sys.exit(BROKEN_PIPE)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM where there is no step to finish."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated("terminated")

    on_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if on_main_thread else None
    try:
        yield
    finally:
        if on_main_thread:
            signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    exit_code = TERMINATED


# --- From words to a command ----------------------------------------------------------------------


def _command(argv: list[str]) -> Command:
    """The command; its settings are those of a preset, or of the run that it works on, at first."""
    first, _ = tyro.cli(_First, args=argv, add_help=False, return_unknown_args=True)
    if first.version:
        print(f"fastgeo {fastgeo.__version__}")
        sys.exit(0)
    preset, method = first.preset or "digits", first.method
    config = chosen(preset, method)
    try:
        command = _parsed(argv, preset, config)
    except _Refused:  # though a run that is there may take what a preset's curve does not
        command = _parsed(argv, preset, PRESETS[preset])
        if command.there is None:
            raise
    # A preset that is named says what the settings are to be, also with --resume. What follows is
    # told the folder by the first process, which says so if it is not seen.
    if command.there is not None and first.preset is None and not _follows():
        from fastgeo.app.folder import Run

        own = Run.open(command.there).config
        command = _parsed(argv, preset, own.by(method) if method else own)
    return command


def _parsed(argv: list[str], preset: str, config: Config) -> Command:
    folder: Any = tyro.MISSING
    named: Any = config.method
    commands: dict[str, Command] = {
        "run": RunCommand(config=config, preset=preset, method=named),
        "train": TrainCommand(config=config, preset=preset),
        "match": MatchCommand(config=config, folder=folder),
        "optimize": OptimizeCommand(config=config, folder=folder, method=named),
        "evaluate": EvaluateCommand(config=config, folder=folder),
        "plot": PlotCommand(config=config, folder=folder),
        "plane": PlaneCommand(config=config, folder=folder),
        "compare": CompareCommand(config=config, runs=folder),
        "status": StatusCommand(config=config, folder=folder),
        "profile": ProfileCommand(config=config.by("geodesic"), preset=preset),
    }
    said = {name: (command.__doc__ or "").split("\n")[0] for name, command in commands.items()}
    return tyro.cli(
        tyro.extras.subcommand_type_from_defaults(commands, said),
        args=argv,
        prog="fastgeo",
        description=__doc__,
        registry=VALUES,
        config=(OmitArgPrefixes,),
    )


class _Refused(Exception):
    """A setting that cannot be meant: a ValueError would reach the user in tyro's frame."""


VALUES = ConstructorRegistry()


@VALUES.struct_rule
def _value(info: StructTypeInfo) -> StructConstructorSpec | None:
    """A flag for every attribute of our dataclasses, with the help that its docstring gives."""
    if not is_dataclass(info.type) or not info.type.__module__.startswith("fastgeo."):
        return None
    kind: Any = info.type
    default, config = info.default, getattr(info.default, "config", None)

    def make(**given: Any) -> Any:
        try:
            if config is not None:
                taken = {name: given.pop(name) for name in kind.takes}
                given["config"] = replace(config, **taken)
            return kind(**given)
        except ValueError as error:
            raise _Refused(str(error)) from error

    lacks = ("config", *kind.lacks) if config is not None else ()
    specs = _specs(kind, default, [f.name for f in fields(kind) if f.init and f.name not in lacks])
    if config is not None:
        specs += _specs(Config, config, kind.takes)
    return StructConstructorSpec(make, tuple(specs))


def _specs(kind: type, default: Any, names: Sequence[str]) -> list[StructFieldSpec]:
    hints, said = get_type_hints(kind, include_extras=True), meanings(kind)
    return [StructFieldSpec(n, hints[n], getattr(default, n), said.get(n)) for n in names]


# --- What is said ---------------------------------------------------------------------------------


def _sentence(error: Exception) -> str:
    reason, file = getattr(error, "strerror", None), getattr(error, "filename", None)
    return f"{file}: {reason}" if reason and file else _in_flags(str(error))


def _in_flags(text: str) -> str:
    """Settings by their names on the command line, where the library says an argument's."""
    names = "|".join(about())
    text = re.sub(
        rf"(?<![\w/.-])({names})=(['\"]?)(\w+)\2(?!\w)",
        lambda found: f"--{flag(found[1])} {found[3]}",
        text,
    )
    return re.sub(rf"(?<![\w/.-])({names})(?![\w/.=-])", lambda found: flag(found[1]), text)


def _complain(sentence: str, error: BaseException) -> None:
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    print(sentence + notes, file=sys.stderr)


def _busy() -> float:
    """How many of the cores other processes use, if that is about all of them; or 0."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    load = os.getloadavg()[0]
    return min(load, cores) if load > cores - 0.5 else 0


def _wait_without_spinning() -> None:
    """OpenMP's threads spin while they wait for each other, on cores that others need for what is
    waited for: a training took two to six times as long. Read when torch is first imported."""
    if _busy():
        os.environ.setdefault("GOMP_SPINCOUNT", "0")


def _say_if_busy() -> None:
    import torch

    if _busy() and torch.get_num_threads() > 1:
        print(
            f"Other processes keep about {_busy():.0f} of the cores busy; OMP_NUM_THREADS=1 may be "
            f"faster than {torch.get_num_threads()} threads"
        )


class _Lines:
    """Progress as a line every few seconds, where no terminal draws a bar over itself."""

    def __init__(self, stream: TextIO):
        self._stream, self._bar, self._drawing, self._next = stream, "", False, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            self._drawing, self._bar = True, text.strip() or self._bar
            if text.strip() and time.monotonic() >= self._next:
                self._say()
                self._next = time.monotonic() + INTERVAL
        elif self._drawing and text == "\n":  # a bar is finished
            self._say()
            self._drawing, self._next = False, 0.0
        else:
            self._drawing = False
            self._stream.write(text)
        return len(text)

    def _say(self) -> None:
        if self._bar:
            self._stream.write(f"{self._bar}\n")
        self._bar = ""


@contextlib.contextmanager
def _progress_by_lines() -> Iterator[None]:
    if sys.stderr.isatty():
        yield
    else:
        lines: Any = _Lines(sys.stderr)
        with contextlib.redirect_stderr(lines):
            yield


if __name__ == "__main__":
    main()
