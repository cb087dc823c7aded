"""The stages of a run, each on the folder that the one before left.

    config.json                every setting, and what each stage took and found
    ends.safetensors           a/NAME and b/NAME
    training.jsonl             a line a training step
    permutation.safetensors    permutation/NAME, which bring b to a
    path.safetensors           the geodesic
    metrics.jsonl              a line an optimisation step
    report.json                the evaluation of the three paths
    report.md, path_loss.png, path_length.png

A stage that is cut short leaves what it had as ends.partial or path.partial.safetensors.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from fastgeo import models, plot, report
from fastgeo.config import Config, flag
from fastgeo.data import Dataset, load
from fastgeo.evaluate import evaluate
from fastgeo.files import (
    read_json,
    read_json_lines,
    read_tensors,
    write_bytes,
    write_figure,
    write_json,
    write_tensors,
)
from fastgeo.matching import match
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.permutation import permutation_axes, permute
from fastgeo.train import train_ends, training_steps

WRITES = {
    "train": ("ends.safetensors", "ends.partial.safetensors", "training.jsonl"),
    "match": ("permutation.safetensors",),
    "optimize": ("path.safetensors", "path.partial.safetensors", "metrics.jsonl"),
    "evaluate": ("report.json",),
    "plot": ("report.md", "path_loss.png", "path_length.png"),
}
STAGES = tuple(WRITES)
SAME_FUNCTION = 1e-10  # relative change of logits by a permutation, in float64


class Run:
    """A run folder and its settings.

    Attributes:
        folder: where it is.
        config: all settings.
        stages: name of each finished stage -> what it took ("seconds") and found.
    """

    def __init__(self, folder: FilePath, config: Config, stages: dict[str, dict] | None = None):
        self.folder, self.config, self.stages = folder, config, stages or {}

    @classmethod
    def create(cls, folder: FilePath, config: Config, *, overwrite: bool) -> "Run":
        """A new run in a new or empty folder, or in place of a run there if overwrite.

        Raises:
            ValueError: a folder that holds something else, or settings that do not fit the data;
                nothing is changed then.
        """
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; name a folder with --out")
        if folder.exists() and any(folder.iterdir()):
            try:
                cls.open(folder)
            except ValueError as error:
                raise ValueError(
                    f"{folder} is not empty and holds no run ({error}); name another with --out"
                ) from error
            if not overwrite:
                raise ValueError(
                    f"{folder} already holds a run; name another with --out, or --overwrite it"
                )
        if config.data.startswith("npz:"):  # later stages may start from another folder
            file = FilePath(config.data.removeprefix("npz:")).expanduser().absolute()
            config = replace(config, data=f"npz:{file}")
        run = cls(folder, config)
        run.check()
        folder.mkdir(parents=True, exist_ok=True)
        run.drop("train")
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
        content = read_json(file)
        try:
            return cls(folder, Config(**content["config"]), dict(content["stages"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read {file}: {error}") from error

    def redo(self, stage: str, *, overwrite: bool, **changes: object) -> "Run":
        """The same run with other settings, about to do a stage (again).

        Raises:
            ValueError: the stage was done and not overwrite, or one before it was not.
        """
        for before in STAGES[: STAGES.index(stage)]:
            result = WRITES[before][0]
            if before not in self.stages or not self.file(result).exists():
                raise ValueError(
                    f"{self.folder} has no {result} yet; make it with: {self.again(before)}"
                )
        if self.file(WRITES[stage][0]).exists() and not overwrite:
            raise ValueError(
                f"{self.file(WRITES[stage][0])} exists; --overwrite replaces it and what later "
                "stages made of it"
            )
        run = Run(self.folder, replace(self.config, **changes), self.stages)
        if stage != "plot":
            run.check()
        run.drop(stage)
        return run

    def again(self, stage: str) -> str:
        """The command that does a stage of this run."""
        if stage == "train":
            return f"fastgeo train --out {self.folder} --overwrite"
        return f"fastgeo {stage} {self.folder}"

    def check(self) -> None:
        """ValueError if the settings do not fit the data, the network or the machine."""
        self.new_module()
        training_steps(self.dataset, self.config)

    def drop(self, stage: str) -> None:
        """Remove what this stage and later ones wrote."""
        for name in STAGES[STAGES.index(stage) :]:
            self.stages.pop(name, None)
            for file in WRITES[name]:
                self.file(file).unlink(missing_ok=True)
        self.save_config()

    def finish(self, stage: str, **found: object) -> None:
        self.stages[stage] = found
        self.save_config()

    def save_config(self) -> None:
        write_json(self.file("config.json"), {"config": asdict(self.config), "stages": self.stages})

    def file(self, name: str) -> FilePath:
        return self.folder / name

    @cached_property
    def device(self) -> torch.device:
        name = self.config.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
            if device.type not in ("cpu", "cuda"):
                raise ValueError("fastgeo runs on cpu and cuda")
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {name!r} cannot be used: {reason}") from error

    @cached_property
    def dataset(self) -> Dataset:
        """The data, on the device, large enough for the batches."""
        c = self.config
        dataset = load(c.data, root=c.data_root, augment=c.augment, train_subset=c.train_subset)
        for name in ("train_batch_size", "batch_size"):
            if getattr(c, name) > len(dataset.train.labels):
                raise ValueError(
                    f"{flag(name)} {getattr(c, name)} is larger than the data set: "
                    f"{len(dataset.train.labels)} training images of {c.data}"
                )
        return dataset.to(self.device)

    def new_module(self) -> nn.Module:
        """A freshly initialised network for the data."""
        c, (channels, height, width) = self.config, self.dataset.image_shape
        classes = self.dataset.num_classes
        if c.model == "mlp":
            hidden = max(1, round(512 * c.width))
            return models.mlp(channels * height * width, (hidden,) * 3, classes)
        if depth := re.fullmatch(r"resnet(\d+)", c.model):
            return models.resnet(
                int(depth[1]), c.width, in_channels=channels, num_classes=classes, norm=c.norm
            )
        raise ValueError(f"model must be resnet8, resnet14, resnet20, ... or mlp, got {c.model!r}")

    def ends(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The states of a and b as trained."""
        groups = read_tensors(self.file("ends.safetensors"), "ends", self.device)
        return groups["a"], groups["b"]

    def matched(self, b: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state of b with its channels permuted towards a."""
        groups = read_tensors(self.file("permutation.safetensors"), "permutation", self.device)
        return permute(permutation_axes(b), groups["permutation"], b)


def train(run: Run) -> None:
    """Train both ends in one stacked pass."""
    c = run.config
    with (
        _stage(run, "train"),
        _steps(run, "training.jsonl", "ends.partial.safetensors", _write_ends) as on_step,
    ):
        ends = train_ends(
            run.new_module, run.dataset, (c.seed_a, c.seed_b), c, on_step=on_step, progress=True
        )
        _write_ends(run.file("ends.safetensors"), ends)


def match_ends(run: Run) -> None:
    """Match b to a, and check that the permuted b computes what b computes."""
    c = run.config
    with _stage(run, "match") as found:
        a, b = run.ends()
        matching = match(a, b, max_sweeps=c.match_sweeps, seed=c.match_seed, progress=True)
        inputs, _ = next(iter(run.dataset.in_order("train", c.eval_batch_size)))
        change = change_of_logits(run.new_module(), b, matching.state_dict, inputs)
        if not change <= SAME_FUNCTION:
            raise ValueError(
                f"the permuted network does not compute what b does: logits differ by {change:.1e} "
                "of the largest"
            )
        permutations = {"permutation": matching.permutations}
        write_tensors(run.file("permutation.safetensors"), "permutation", permutations)
        found.update(
            objective_before=matching.objective_before,
            objective_after=matching.objective_after,
            sweeps=matching.sweeps,
            relative_change_of_logits=change,
        )


def change_of_logits(
    module: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], inputs: Tensor
) -> float:
    """Largest difference of the logits of two states, over the largest logit; in float64."""
    with torch.no_grad():
        was, now = (
            torch.func.functional_call(
                module.double(),
                {name: tensor.double().cpu() for name, tensor in state.items()},
                (inputs.double().cpu(),),
            )
            for state in (before, after)
        )
    return ((now - was).abs().max() / was.abs().max()).item()


def optimize_path(run: Run) -> None:
    """Optimise the interior of the line from a to the matched b."""
    c = run.config
    with (
        _stage(run, "optimize"),
        _steps(run, "metrics.jsonl", "path.partial.safetensors", _write_path) as on_step,
    ):
        a, b = run.ends()
        path = optimize(
            Path.linear(a, run.matched(b), c.points, spacing=c.spacing),
            run.new_module(),
            run.dataset.shuffled(c.batch_size, torch.Generator().manual_seed(c.path_seed)),
            steps=c.steps,
            lr=c.lr,
            precondition=c.precondition,
            on_step=on_step,
            progress=True,
        )
        _write_path(run.file("path.safetensors"), path)


def evaluate_paths(run: Run) -> None:
    """Evaluate the line, the matched line and the geodesic, and write report.json."""
    c = run.config
    with _stage(run, "evaluate"):
        a, b = run.ends()
        paths = {
            "linear": Path.linear(a, b, c.points, spacing=c.spacing),
            "matched": Path.linear(a, run.matched(b), c.points, spacing=c.spacing),
            "geodesic": Path.load(run.file("path.safetensors"), run.device),
        }
        in_order, size = run.dataset.in_order, c.eval_batch_size
        splits = {split: in_order(split, size) for split in ("train", "test")}
        if run.dataset.augmented:
            splits["augmented_train"] = in_order("train", size, augment_seed=c.path_seed)
        module = run.new_module()
        results = {
            name: evaluate(path, module, splits, progress=True, description=f"evaluate {name}")
            for name, path in paths.items()
        }
    write_json(run.file("report.json"), report.build(c, run.stages, run.device, results))


def plot_report(run: Run) -> str:
    """Draw the figures and write report.md; returns the summary table."""
    content = read_json(run.file("report.json"))
    metrics = read_json_lines(run.file("metrics.jsonl"))
    try:
        figures = {
            "path_loss.png": plot.loss_figure(content),
            "path_length.png": plot.length_figure(metrics, content),
        }
        for name, figure in figures.items():
            write_figure(run.file(name), figure)
        write_bytes(run.file("report.md"), report.markdown(content).encode())
        return report.summary(content)
    except KeyError as error:
        raise ValueError(
            f"report.json or metrics.jsonl in {run.folder} lacks {error}; make them anew with: "
            f"{run.again('optimize')} --overwrite"
        ) from error


def run_all(run: Run) -> str:
    """All stages in order; returns the summary table."""
    train(run)
    match_ends(run)
    optimize_path(run)
    evaluate_paths(run)
    return plot_report(run)


@contextlib.contextmanager
def _stage(run: Run, name: str) -> Iterator[dict[str, Any]]:
    """Time a stage and record it with what it found; if it is cut short, note how to go on."""
    started, found = time.perf_counter(), {}
    try:
        yield found
    except BaseException as error:
        error.add_note(f"finished stages are in {run.folder}; go on with: {run.again(name)}")
        raise
    run.finish(name, seconds=time.perf_counter() - started, **found)


@contextlib.contextmanager
def _steps(
    run: Run, log: str, partial: str, write: Callable[[FilePath, Any], None]
) -> Iterator[Callable[[dict, Any], None]]:
    """An on_step callback that logs a line a step; if the stage is cut short, the last good state
    is kept in the file `partial`, and the exception carries a note that says so."""
    latest = None

    def on_step(metrics: dict, state: Any) -> None:
        nonlocal latest
        latest = state
        stream.write(json.dumps(metrics) + "\n")

    with open(run.file(log), "w", encoding="utf-8", buffering=1) as stream:
        try:
            yield on_step
        except BaseException as error:
            if latest is not None:
                write(run.file(partial), latest)
                error.add_note(f"the last good state is in {run.file(partial)}")
            raise


def _write_ends(file: FilePath, ends: list[dict[str, Tensor]]) -> None:
    write_tensors(file, "ends", dict(zip("ab", ends, strict=True)))


def _write_path(file: FilePath, path: Path) -> None:
    path.save(file)
