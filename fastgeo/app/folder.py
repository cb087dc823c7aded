"""A run folder: its settings, what each stage took and found, and its files.

config.json             every setting and where it is from, what each stage took and found, the
                        engines chosen, and the SHA-256 of each stage's files and of the data's,
                        if that is an npz or a text
ends.safetensors        a/NAME and b/NAME (and c/NAME, ... of further networks)
training.jsonl          a line a training step
permutation.safetensors    permutation/NAME, which bring b to a
matched.safetensors     the permuted b, a plain state dict
folded.safetensors      a in the form of that, if they are matched by all symmetries
matching.md             what was matched, how well, and which axes stay and why
path.safetensors        the optimised path
metrics.jsonl           a line an optimisation step
report.json             the evaluation of the three paths
report.md, path_loss.png, path_length.png      (and the figures as .pdf or .svg, by --format)
plane.json, plane.png   the plane around the path, if it is asked for
checkpoint/             where a stage that is not finished goes on from
stopped.json            how a command on several processes ended
training.csv, metrics.csv, tensorboard/     if they are asked for by --log
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path as FilePath
from typing import get_args

from tqdm import tqdm

from fastgeo.app import preflight, report
from fastgeo.app.config import Config, Drawing, Format, Pace, about, flag
from fastgeo.app.given import Given, State, with_absolute_files
from fastgeo.forward.options import Forward, way
from fastgeo.store import lock
from fastgeo.store.checkpoint import Checkpoints
from fastgeo.store.files import (
    PART,
    cannot_write,
    read_json,
    read_tensors,
    remove_folder,
    sha256_of,
    write_json,
)

FIGURES = ("path_loss", "path_length")
PLANE = ("plane.json", *(f"plane.{form}" for form in get_args(Format)))
WRITES = {
    "train": ("ends.safetensors", "training.jsonl", "training.csv"),
    "match": (
        *("permutation.safetensors", "matched.safetensors", "folded.safetensors"),
        "matching.md",
    ),
    # The plane is made of the path later on, by a command of its own, and goes when the path goes.
    "optimize": ("path.safetensors", "metrics.jsonl", "metrics.csv", *PLANE),
    "evaluate": ("report.json",),
    "plot": ("report.md", *(f"{name}.{form}" for name in FIGURES for form in get_args(Format))),
}
STAGES = tuple(WRITES)
WEIGHTS = tuple(WRITES[stage][0] for stage in ("train", "match", "optimize"))
MATCHED = ("ends.safetensors", "permutation.safetensors", "matched.safetensors")
READS = {
    "train": (),
    "match": ("ends.safetensors",),
    "optimize": MATCHED,
    "evaluate": (*MATCHED, "path.safetensors"),
    "plot": (*WEIGHTS, "metrics.jsonl", "report.json"),
}


CHOSEN = ("engine", "channels_last", "chunk", "precision")  # of an engine


class Run:
    """A run folder and its settings.

    `create`, `resume` and `redo` give one to work in, where no other process may be meanwhile.

    Attributes:
        folder: where it is.
        config: all settings.
        given: what they name.
        stages: name of each finished stage -> what it took ("seconds") and found.
        engines: name of each stage -> the engine chosen in it, which is kept if it is done again.
        data: SHA-256 of the file of the data, or of those of its files, joined; None for data that
            are not read from files here.
        pace: how often states are saved, and when to stop.
        quiet: whether stages show no progress.
        drawing: how figures are drawn.
    """

    def __init__(
        self,
        folder: FilePath,
        config: Config,
        *,
        stages: Mapping[str, dict] | None = None,
        engines: Mapping[str, dict] | None = None,
        data: str | None = None,
    ):
        self.folder, self.config = folder, config
        self.given = Given(config)
        self.stages, self.engines, self.data = dict(stages or {}), dict(engines or {}), data
        self.pace, self.quiet, self.drawing = Pace(), False, Drawing()
        self._verified: set[str] = set()

    @classmethod
    @contextlib.contextmanager
    def create(
        cls, folder: FilePath, config: Config, *, overwrite: bool = False
    ) -> Iterator["Run"]:
        """A new run in a new or empty folder, or in place of a run there if overwrite.

        Raises:
            ValueError: a folder that holds something else, or settings that do not fit the data;
                nothing is changed then.
        """
        cls._refuse_folder(folder, overwrite)
        run = cls(folder, with_absolute_files(config))
        run.check()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        with lock.locked(folder):
            cls._refuse_folder(folder, overwrite)  # again: another process may have been faster
            run.drop("train")
            yield run

    @classmethod
    def _refuse_folder(cls, folder: FilePath, overwrite: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder with --out")
        if not folder.exists() or not any(map(_is_kept, folder.iterdir())):
            return
        try:
            cls.open(folder)
        except ValueError as error:
            raise ValueError(
                f"{folder} is not empty and holds no run ({error}); name another with --out"
            ) from error
        if not overwrite:
            raise ValueError(
                f"{folder} already holds a run; name another folder with --out, go on with the run "
                "by --resume, or replace it by --overwrite"
            )

    @classmethod
    def open(cls, folder: FilePath) -> "Run":
        """The run in a folder, to be looked at.

        Raises:
            ValueError: no run there, or a damaged config.json.
        """
        file = folder / "config.json"
        if not file.exists():
            raise ValueError(f"{folder} holds no run (no config.json); start one with: fastgeo run")
        try:
            content = read_json(file)
            kept = {name: content[name] for name in ("stages", "engines", "data")}
            return cls(folder, Config.of(content["config"]), **kept)
        except (KeyError, TypeError, ValueError) as error:
            what = str(error) if str(file) in str(error) else f"cannot read {file}: {error}"
            raise ValueError(
                f"{what}; restore a copy of it, or begin anew in another folder: the settings "
                f"are lost, but not the weights in {folder}"
            ) from error

    @classmethod
    @contextlib.contextmanager
    def resume(cls, folder: FilePath, config: Config) -> Iterator["Run"]:
        """A run that was stopped, to go on with wherever that was.

        Raises:
            ValueError: other settings than it has, or a damaged file.
        """
        with lock.locked(folder):
            run = cls.open(folder)
            run.refuse_changes(config)
            run.tidy()
            run.verify([name for found in run.stages.values() for name in found["files"]])
            run.check()
            yield run

    @classmethod
    @contextlib.contextmanager
    def redo(
        cls,
        folder: FilePath,
        stage: str,
        config: Config,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> Iterator["Run"]:
        """The run in a folder, perhaps with other settings, about to do a stage, or to go on with
        it.

        Raises:
            ValueError: the stage was done or begun and neither overwrite nor resume, one before it
                was not done, or settings that change in the middle of it.
        """
        with lock.locked(folder):
            there = cls.open(folder)
            if resume:
                there.refuse_changes(config)
            config = with_absolute_files(config)
            engines = there.engines if config == there.config else {}
            run = cls(folder, config, stages=there.stages, engines=engines, data=there.data)
            run._refuse_stage(stage, overwrite or resume)
            run.verify(READS[stage])
            if stage != "plot":
                run.check()
            if not resume:
                run.drop(stage)
            yield run

    @classmethod
    @contextlib.contextmanager
    def evaluated(cls, folder: FilePath) -> Iterator["Run"]:
        """The run in a folder, whose paths are evaluated, to look at them further.

        Raises:
            ValueError: they are not yet, or a damaged file.
        """
        with lock.locked(folder):
            run = cls.open(folder)
            run._refuse_stage("plot", again=True)
            run.verify(["path.safetensors", "report.json"])
            run.check()
            yield run

    def _refuse_stage(self, stage: str, again: bool) -> None:
        """ValueError if one before it is not done, or it is, or begun, and not to be done again."""
        for before in STAGES[: STAGES.index(stage)]:
            result = WRITES[before][0]
            if before not in self.stages or not self.file(result).exists():
                raise ValueError(
                    f"{self.folder} has no {result} yet; make it with: {self.again(before)}"
                )
        if self.file(WRITES[stage][0]).exists() and not again:
            raise ValueError(
                f"{self.file(WRITES[stage][0])} exists already; --overwrite replaces it, and "
                "removes what later stages made of it"
            )
        begun = max(self.file("checkpoint").glob(f"{stage}-*"), default=None)
        if begun and not again:
            raise ValueError(
                f"{begun} holds the state of an unfinished {stage}; give --resume to go on from "
                "it, or --overwrite to begin anew"
            )

    def refuse_changes(self, config: Config) -> None:
        """ValueError, naming the first difference, unless the settings are those of this run."""
        there, here = self.config.settings, with_absolute_files(config).settings
        for name, value in there.items():
            if value != here[name]:
                raise ValueError(
                    f"--{flag(name)} is {value} in {self.folder}, not {here[name]}, and --resume "
                    "goes on with the run's own settings; leave the setting out, or begin anew "
                    "with --overwrite"
                )

    def tidy(self) -> None:
        """Remove what a process left that was killed while it was writing."""
        for file in self.folder.glob(f".*{PART}"):
            file.unlink(missing_ok=True)

    def again(self, stage: str) -> str:
        """The command that does a stage of this run."""
        if stage == "train":
            return f"fastgeo train --out {self.folder} --overwrite"
        return f"fastgeo {stage} {self.folder}"

    def next_after(self, stage: str) -> str:
        """What a stage left, and the command for the next one."""
        following = STAGES[STAGES.index(stage) + 1]
        return f"{self.file(WRITES[stage][0])}; next: {self.again(following)}"

    @property
    def go_on(self) -> str:
        """The command that does all that is left to do."""
        return f"fastgeo run --out {self.folder} --resume"

    def checkpoints(self, stage: str, log: str | None = None) -> Checkpoints:
        """Where a stage saves its states; they belong to its settings and to what it reads."""
        return Checkpoints(
            self.file("checkpoint"),
            seconds=self.pace.checkpoint_seconds,
            max_minutes=self.pace.max_minutes,
            started=self.pace.started,
            of=self.config.settings | {name: self.recorded(name) for name in READS[stage]},
            log=None if log is None else self.file(log),
        )

    def recorded(self, name: str) -> str | None:
        """The SHA-256 that a file had when its stage was finished."""
        for found in self.stages.values():
            if name in found.get("files", {}):
                return found["files"][name]
        return None

    def verify(self, names: Sequence[str]) -> None:
        """ValueError, naming the file, unless these are as their stages left them."""
        for name in names:
            if name in self._verified:
                continue
            stage = next(stage for stage in STAGES if name in WRITES[stage])
            again = self.again(stage).removesuffix(" --overwrite") + " --overwrite"
            try:
                same = sha256_of(self.file(name)) == self.recorded(name)
            except ValueError as error:
                raise ValueError(f"{error}; make it again with: {again}") from error
            if not same:
                raise ValueError(
                    f"cannot read {self.file(name)}: it is not as {stage} left it here; it was "
                    f"damaged or edited, or is of another run; make it again with: {again}"
                )
            self._verified.add(name)

    def check(self) -> None:
        """ValueError if the settings do not fit the data, the network or the machine, or the files
        of the data are not what they were when the run was begun."""
        digests = [sha256_of(file) for file in self.given.data_files]
        if digests:
            joined = sha256("".join(digests).encode()).hexdigest()
            found = joined if digests[1:] else digests[0]
            if self.data not in (None, found):
                name = self.config.data.data.partition(":")[2]
                raise ValueError(
                    f"{name} has changed since {self.folder} was begun; restore it, or begin anew "
                    "in another folder"
                )
            self.data = found
        preflight.check(self.given)

    def drop(self, stage: str) -> None:
        """Remove what this stage and later ones wrote."""
        dropped = STAGES[STAGES.index(stage) :]
        for name in dropped:
            self.stages.pop(name, None)
        self.save_config()  # first, since a stage without its files is damage
        for name in dropped:
            for file in WRITES[name]:
                self.file(file).unlink(missing_ok=True)
            remove_folder(self.file("tensorboard") / name)
        Checkpoints(self.file("checkpoint")).clear()
        self.tidy()

    def finish(self, stage: str, **found: object) -> None:
        """Record a stage with what it found and the SHA-256 of its files."""
        names = [name for name in WRITES[stage] if self.file(name).exists()]
        files = {name: sha256_of(self.file(name)) for name in names}
        self.stages[stage] = {**found, "files": files}
        self._verified.update(names)
        self.save_config()
        Checkpoints(self.file("checkpoint")).clear()

    def save_config(self) -> None:
        content = {
            "config": self.config.settings,
            "stages": self.stages,
            "engines": self.engines,
            "data": self.data,
            "about": about(),
        }
        write_json(self.file("config.json"), content)

    def forward(self, stage: str) -> tuple[Forward, Callable[[dict], None] | None]:
        """How a stage evaluates networks, as before if it chose on this device, and what is to be
        told of a choice."""
        known, device = self.engines.get(stage, {}), str(self.given.device)
        forward, config = self.config.forward_of(stage), self.config
        between = config.descent.nodes or config.path.points - 2
        if stage == "optimize" and known.get("points") != between:
            known = {}  # of a coarser path
        if known.get("device") == device:
            chosen = {name: known[name] for name in CHOSEN}
            forward = replace(forward, **chosen, memory_budget=None)

        def on_choice(choice: dict) -> None:
            self.engines[stage] = {**choice, "device": device}
            self.save_config()
            if seconds := choice["seconds"]:
                times = "; ".join(f"{name} {1e3 * s:.0f} ms" for name, s in seconds.items())
                chosen = way(**{name: choice[name] for name in CHOSEN})
                tqdm.write(f"{stage}: engine {chosen} was chosen ({times})")

        return forward, None if known else on_choice

    def file(self, name: str) -> FilePath:
        return self.folder / name

    def summary(self) -> str:
        """The table that a run ends with."""
        return report.summary(read_json(self.file("report.json")))

    @cached_property
    def ends(self) -> tuple[State, State]:
        """The states of a and b."""
        groups = read_tensors(self.file("ends.safetensors"), "ends", self.given.device)
        return groups["a"], groups["b"]

    @property
    def matched(self) -> tuple[State, State]:
        """The states that a path joins: a, and b with its channels permuted towards a; of all
        symmetries a in the form that this has."""
        b = self.given.state(self.file("matched.safetensors"))
        if self.config.matching.symmetries == "permutation":
            return self.ends[0], b
        self.verify(["folded.safetensors"])
        return self.given.state(self.file("folded.safetensors")), b


def _is_kept(file: FilePath) -> bool:
    """Whether a file is more than what a killed process may leave of itself."""
    return file.name != lock.NAME and not (file.name.startswith(".") and file.suffix == PART)
