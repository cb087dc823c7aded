"""A run folder: its settings, what each stage took and found, and its files.

config.json             every setting and where it is from, what each stage took and found, the
                        engines chosen, and the SHA-256 of each stage's files and of the data's,
                        if that is an npz
ends.safetensors        a/NAME and b/NAME (and c/NAME, ... of further networks)
training.jsonl          a line a training step
permutation.safetensors    permutation/NAME, which bring b to a
matched.safetensors     the permuted b, a plain state dict
matching.md             what was matched, how well, and which axes stay and why
path.safetensors        the geodesic
metrics.jsonl           a line an optimisation step
report.json             the evaluation of the three paths
report.md, path_loss.png, path_length.png
checkpoint/             where a stage that is not finished goes on from
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.app import named, preflight
from fastgeo.app.config import BEFORE, Config, about, flag
from fastgeo.data.images import Dataset
from fastgeo.data.loaders import LoaderData
from fastgeo.store import lock
from fastgeo.store.checkpoint import Checkpoints
from fastgeo.store.files import PART, cannot_write, read_json, read_tensors, sha256_of, write_json
from fastgeo.symmetry.derive import permutation_spec

WRITES = {
    "train": ("ends.safetensors", "training.jsonl"),
    "match": ("permutation.safetensors", "matched.safetensors", "matching.md"),
    "optimize": ("path.safetensors", "metrics.jsonl"),
    "evaluate": ("report.json",),
    "plot": ("report.md", "path_loss.png", "path_length.png"),
}
STAGES = tuple(WRITES)
WEIGHTS = tuple(WRITES[stage][0] for stage in ("train", "match", "optimize"))
READS = {
    "train": (),
    "match": WEIGHTS[:1],
    "optimize": WEIGHTS[:2],
    "evaluate": WEIGHTS,
    "plot": (*WEIGHTS, "metrics.jsonl", "report.json"),
}


class Run:
    """A run folder and its settings; as a context, no other process may work in it.

    Attributes:
        folder: where it is.
        config: all settings.
        stages: name of each finished stage -> what it took ("seconds") and found.
        engines: name of each stage -> the engine chosen in it, which is kept if it is done again.
        data: SHA-256 of the file of data npz:PATH, None for other data.
        pace: how often states are saved and when to stop, as `fastgeo.Checkpoints` takes them.
    """

    def __init__(
        self,
        folder: FilePath,
        config: Config,
        stages: dict[str, dict] | None = None,
        engines: dict[str, dict] | None = None,
        data: str | None = None,
    ):
        self.folder, self.config = folder, config
        self.stages, self.engines, self.data = stages or {}, engines or {}, data
        self.pace: dict[str, float] = {}
        self._lock: lock.Lock | None = None
        self._verified: set[str] = set()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.release()

    @classmethod
    def create(cls, folder: FilePath, config: Config, *, overwrite: bool) -> "Run":
        """A new run in a new or empty folder, or in place of a run there if overwrite.

        Raises:
            ValueError: a folder that holds something else, or settings that do not fit the data;
                nothing is changed then.
        """

        def check_folder() -> None:
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
                    f"{folder} already holds a run; name another with --out, go on with it by "
                    "--resume, or --overwrite it"
                )

        check_folder()
        run = cls(folder, named.with_absolute_files(config))
        run.check()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        run._lock = lock.Lock(folder)
        try:
            check_folder()  # again: another process may have been faster
            run.drop("train")
        except BaseException:
            run._lock.release()
            raise
        return run

    @classmethod
    def open(cls, folder: FilePath) -> "Run":
        """The run in a folder.

        Raises:
            ValueError: no run there, or a damaged config.json.
        """
        file = folder / "config.json"
        if not file.exists():
            raise ValueError(f"{folder} holds no run (no config.json); start one with: fastgeo run")
        try:
            content = read_json(file)
            config, stages = Config(**{**BEFORE, **content["config"]}), dict(content["stages"])
            return cls(folder, config, stages, dict(content["engines"]), content.get("data"))
        except (KeyError, TypeError, ValueError) as error:
            what = str(error) if str(file) in str(error) else f"cannot read {file}: {error}"
            raise ValueError(
                f"{what}; bring back a copy of it, or begin anew in another folder: the settings "
                f"are lost, not the weights in {folder}"
            ) from error

    def redo(
        self, stage: str, *, overwrite: bool, resume: bool = False, **changes: object
    ) -> "Run":
        """The same run with other settings, about to do a stage (again), or to go on with it.

        Raises:
            ValueError: the stage was done or begun and neither overwrite nor resume, one before it
                was not done, or settings that change in the middle of it.
        """
        run = Run(self.folder, named.with_absolute_files(replace(self.config, **changes)))
        run._lock = lock.Lock(self.folder)
        try:
            run.stages = Run.open(self.folder).stages  # as they are now that no other is at work
            run.data = self.data
            run.engines = self.engines if run.config == self.config else {}
            if resume:
                self.refuse_changes(run.config)
            run._prepare(stage, overwrite, resume)
        except BaseException:
            run._lock.release()
            raise
        return run

    def _prepare(self, stage: str, overwrite: bool, resume: bool) -> None:
        for before in STAGES[: STAGES.index(stage)]:
            result = WRITES[before][0]
            if before not in self.stages or not self.file(result).exists():
                raise ValueError(
                    f"{self.folder} has no {result} yet; make it with: {self.again(before)}"
                )
        if self.file(WRITES[stage][0]).exists() and not (overwrite or resume):
            raise ValueError(
                f"{self.file(WRITES[stage][0])} exists; --overwrite replaces it and what later "
                "stages made of it"
            )
        if (begun := self.begun(stage)) and not (overwrite or resume):
            raise ValueError(
                f"{begun} is where an unfinished {stage} goes on from; give --resume to do so, or "
                "--overwrite to begin anew"
            )
        self.verify(READS[stage])
        if stage != "plot":
            self.check()
        if not resume:
            self.drop(stage)

    def resume(self, config: Config) -> None:
        """Go on with a run that was stopped, wherever that was.

        Raises:
            ValueError: other settings than it has, or a damaged file.
        """
        self._lock = lock.Lock(self.folder)
        try:
            self.refuse_changes(config)
            self.stages = Run.open(self.folder).stages
            self.tidy()
            self.verify([name for stage in self.stages for name in self.stages[stage]["files"]])
            self.check()
        except BaseException:
            self._lock.release()
            raise

    def refuse_changes(self, config: Config) -> None:
        """ValueError, naming the first difference, unless the settings are those of this run."""
        there, here = asdict(self.config), asdict(named.with_absolute_files(config))
        for name, value in there.items():
            if value != here[name]:
                raise ValueError(
                    f"--{flag(name)} is {value} in {self.folder}, not {here[name]}; --resume goes "
                    "on with the run's own settings: leave it out, or begin anew with --overwrite"
                )

    def tidy(self) -> None:
        """Remove what a process left that was killed while it was writing."""
        for file in self.folder.glob(f".*{PART}"):
            file.unlink(missing_ok=True)

    def begun(self, stage: str) -> FilePath | None:
        """A saved state of a stage that is not finished."""
        return max(self.file("checkpoint").glob(f"{stage}-*"), default=None)

    def again(self, stage: str) -> str:
        """The command that does a stage of this run."""
        if stage == "train":
            return f"fastgeo train --out {self.folder} --overwrite"
        return f"fastgeo {stage} {self.folder}"

    @property
    def go_on(self) -> str:
        """The command that does all that is left to do."""
        return f"fastgeo run --out {self.folder} --resume"

    def checkpoints(self, stage: str, log: str | None = None) -> Checkpoints:
        """Where a stage saves its states; they belong to its settings and to what it reads."""
        files = {name: self.recorded(name) for name in READS[stage]}
        return Checkpoints(
            self.file("checkpoint"),
            of={**asdict(self.config), **files},
            before=BEFORE,
            log=None if log is None else self.file(log),
            **self.pace,
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
            again = self.again(stage)
            again += "" if again.endswith("--overwrite") else " --overwrite"
            try:
                same = sha256_of(self.file(name)) == self.recorded(name)
            except ValueError as error:
                raise ValueError(f"{error}; make it anew with: {again}") from error
            if not same:
                raise ValueError(
                    f"cannot read {self.file(name)}: it is not as {stage} left it here, but "
                    f"damaged, edited or of another run; make it anew with: {again}"
                )
            self._verified.add(name)

    def check(self) -> None:
        """ValueError if the settings do not fit the data, the network or the machine, or the data
        are not what they were."""
        preflight.check(self)

    def drop(self, stage: str) -> None:
        """Remove what this stage and later ones wrote."""
        names = STAGES[STAGES.index(stage) :]
        for name in names:
            self.stages.pop(name, None)
        self.save_config()  # first, since a stage without its files is damage
        for name in names:
            for file in WRITES[name]:
                self.file(file).unlink(missing_ok=True)
        Checkpoints(self.file("checkpoint")).clear()
        self.tidy()

    def finish(self, stage: str, **found: object) -> None:
        names = [name for name in WRITES[stage] if self.file(name).exists()]
        files = {name: sha256_of(self.file(name)) for name in names}
        self.stages[stage] = {**found, "files": files}
        self._verified.update(names)
        self.save_config()
        Checkpoints(self.file("checkpoint")).clear()

    def save_config(self) -> None:
        names = ("stages", "engines", "data")
        content = {"config": asdict(self.config), **{name: getattr(self, name) for name in names}}
        content["about"] = about()
        write_json(self.file("config.json"), content)

    def forward(self, stage: str) -> dict[str, Any]:
        """How a stage evaluates networks, as arguments: as before, if it chose on this device."""
        known, forward = self.engines.get(stage, {}), self.config.forward
        if stage == "optimize":
            forward = self.config.step_forward
            if known.get("points") != self.config.points - 2:
                known = {}  # of a coarser path
        if known.get("device") == str(self.device):
            chosen = {name: known[name] for name in ("engine", "channels_last", "chunk")}
            forward = replace(forward, **chosen, memory_budget=None)

        def on_choice(choice: dict) -> None:
            self.engines[stage] = {**choice, "device": str(self.device)}
            self.save_config()
            if seconds := choice["seconds"]:
                times = "; ".join(f"{name} {1e3 * s:.0f} ms" for name, s in seconds.items())
                tqdm.write(f"{stage}: engine {choice['engine']}, of {times}")

        return {"forward": forward} if known else {"forward": forward, "on_choice": on_choice}

    def file(self, name: str) -> FilePath:
        return self.folder / name

    @cached_property
    def device(self) -> torch.device:
        return named.device(self.config)

    @cached_property
    def dataset(self) -> Dataset | LoaderData:
        """The data, on the device, large enough for the batches."""
        return named.dataset(self.config, self.device)

    def new_module(self) -> nn.Module:
        """A freshly initialised network for the data."""
        return named.module(self.config, lambda: self.dataset)

    def given_ends(self) -> list[dict[str, Tensor]]:
        """The states of a and b in the files of weights that the settings name."""
        return named.states(self.config, self.new_module(), self.device)

    def ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The states of a and b."""
        groups = read_tensors(self.file("ends.safetensors"), "ends", self.device)
        return groups["a"], groups["b"]

    def matched(self, b: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of b with its channels permuted towards a."""
        groups = read_tensors(self.file("permutation.safetensors"), "permutation", self.device)
        inputs, _ = next(iter(self.dataset.in_order("train", 2)))
        spec = permutation_spec(self.new_module(), inputs)
        return spec.permute(b, groups["permutation"])


def _is_kept(file: FilePath) -> bool:
    """Whether a file is more than what a killed process may leave of itself."""
    return file.name != lock.NAME and not (file.name.startswith(".") and file.suffix == PART)
