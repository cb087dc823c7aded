"""States of a path that many ranks hold: each writes what it has, and reads what it needs.

    FOLDER/optimize-STEP/state.json                   as of one process; which part has what
                         state.safetensors            generators, order of the data
                         path.safetensors             the two ends
                         part-00002-of-00008.safetensors   rows and columns of one rank

The folder gets its name when all parts are in it, so a state is complete or absent. It is read on
any other mesh, and in one process, as theirs are here; points are read where they are needed, and
no rank reads all of them.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple, Protocol

import safetensors
import torch
from torch import Tensor

from fastgeo.path import Path
from fastgeo.ranks.agreement import WISHES
from fastgeo.ranks.blocks import Block
from fastgeo.ranks.mesh import Ranks
from fastgeo.store.checkpoint import (
    INTERRUPTED,
    KEPT,
    SHARE,
    TERMINATED,
    TIME_IS_UP,
    Checkpoints,
    Groups,
    State,
    Stopped,
    _difference,
)
from fastgeo.store.files import (
    PART,
    cannot_write,
    read_json,
    remove_folder,
    sha256_of,
    sync_folder,
    write_json,
    write_tensors,
)

LARGE = ("interior", "velocity")  # groups that are read row by row
STOPS = (("interrupted", INTERRUPTED), ("terminated", TERMINATED), ("the time is over", TIME_IS_UP))


class Rectangle(NamedTuple):
    """What a rank has of the weights and the momentum.

    Attributes:
        rows: control points, of those between the ends.
        columns: of each group of parameters that lie side by side, the first and the one behind
            the last.
        tensors: group -> name -> tensor; "weight" and "velocity" by the number of such a group,
            "interior" of what is not trained, by name.
    """

    rows: Block
    columns: list[tuple[int, int]]
    tensors: Groups


class Layout(NamedTuple):
    """Where the numbers of a path are in rectangles.

    Attributes:
        controls: between the ends.
        side_by_side: first names of the parameters of each group.
        trained: name -> the first name of the same parameter.
    """

    controls: int
    side_by_side: list[list[str]]
    trained: dict[str, str]


class Holder(Protocol):
    """What has a path on a mesh."""

    def held(self) -> tuple[Path, Layout, Rectangle]:
        """A path with the two ends, where its numbers are, and what this rank has of them."""


class RankStates:
    """The states of one optimisation on a mesh, in the folder of a `fastgeo.Checkpoints`.

    Rank 0's clock says when to save and when the time is over; a signal may come to any rank.
    """

    def __init__(self, checkpoints: Checkpoints, ranks: Ranks):
        self._checkpoints, self._ranks = checkpoints, ranks
        self._agreement = ranks.agreement
        self._agreement.wishes = self._wishes
        self._saved: int | None = None  # the step of the newest state, and that it is now
        self._now = 0
        if not ranks.first:
            checkpoints.log = None

    def load(self, stage: str) -> "tuple[State, Stored] | None":
        """The newest intact state, with its points to be read; None if there is none at all.

        Raises:
            ValueError: as of `Checkpoints.load`.
        """
        own = self._checkpoints
        own._stage = stage
        names = self._agreement.objects([folder.name for folder in own._saved_folders()])[0]
        errors: list[str] = []
        for name in names:
            found = self._agreement.objects(self._opened(own.folder / name))
            content, error = found[0]
            errors += [error or next((text for _, text in found if text), "")]
            if errors[-1]:
                continue
            errors.pop()
            for damage in errors:
                warnings.warn(
                    f"{damage}; going on from step {content['step']} instead", stacklevel=2
                )
            self._done(own.folder, lambda: self._begin_log(content["log"]))  # noqa: B023
            own.seconds_before = content["seconds"]
            return _state(own.folder / name, content)
        if errors:
            raise ValueError(
                f"{errors[0]}; no other state of {stage} is there: remove {own.folder} to start it "
                "anew"
            )
        self._done(own.folder, self._begin_log)
        return None

    def reached(self, step: int, groups: Groups, holder: "Holder") -> None:
        """The ranks are before a step: save their state if they have agreed to, and stop.

        Args:
            groups: what is in the state beside the path.
            holder: of the path.
        """
        self._now = step
        *stops, save = self._agreement.wished
        if any(stops) or save:
            self._write(step, groups, *holder.held())
        for wished, (why, code) in zip(stops, STOPS, strict=True):
            if wished:
                raise Stopped(why, code)

    def record(self, line: Mapping[str, Any]) -> None:
        if self._ranks.first:
            self._checkpoints.record(line)

    def distrust(self) -> None:
        """The state that was just saved, if one was, proves to be no good."""
        if self._saved == self._now and self._ranks.first:
            remove_folder(self._checkpoints._folder_of(self._now))

    def _begin_log(self, saved: Mapping[str, Any] | None = None) -> None:
        if self._checkpoints.log is not None:
            self._checkpoints.log.open(saved)

    def _wishes(self) -> list[bool]:
        own, now = self._checkpoints, time.monotonic()
        code = 0 if own._asked is None else own._asked.exit_code
        over = save = False
        if self._ranks.first:
            minutes = own._minutes
            over = minutes is not None and now - own._minutes_from >= 60 * minutes
            save = now - own._saved >= own._pause
        return [code == INTERRUPTED, code == TERMINATED, over, save][:WISHES]

    def _opened(self, folder: FilePath) -> tuple[dict[str, Any], str]:
        """The content of a state, and why it cannot be read; of its files this rank looks at some,
        so that all are looked at."""
        own, ranks = self._checkpoints, self._ranks
        file = folder / "state.json"
        try:
            content = read_json(file)
            if folder != own._folder_of(content["step"]):
                raise ValueError(f"{file} is of another stage or step: it was moved here")
            if difference := _difference(content["of"], own.of):
                raise ValueError(f"{folder} belongs to another run: {difference}")
            files = list(content["files"].items())
            for name, sha256 in files[ranks.place :: ranks.count]:
                if sha256_of(folder / name) != sha256:
                    raise ValueError(
                        f"cannot read {folder / name}: it was damaged, or is not the one that was "
                        "written here"
                    )
            return content, ""
        except (KeyError, TypeError, AttributeError) as error:
            return {}, f"cannot read {file}: {error} is missing or wrong"
        except ValueError as error:
            return {}, str(error)

    def _write(self, step: int, groups: Groups, path: Path, layout: Layout, own: Rectangle) -> None:
        started, checkpoints, ranks = time.monotonic(), self._checkpoints, self._ranks
        folder = checkpoints._folder_of(step)
        part = folder.with_name(f".{folder.name}{PART}")
        name = f"part-{ranks.place:05d}-of-{ranks.count:05d}"
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            generators["cuda"] = torch.cuda.get_rng_state("cuda")

        def begin() -> None:
            if ranks.first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)

        def parts() -> dict[str, Any]:
            if not part.is_dir():
                raise OSError(f"it has no {part}, which rank 0 has made: all need one folder")
            if ranks.first:
                ends = {k: v for k, v in path._parts().items() if k != "interior"}
                write_tensors(part / "path.safetensors", "path", ends)
                whole = {**groups, "generators": generators}
                write_tensors(part / "state.safetensors", "state", whole)
            if not any(own.tensors.values()):
                return {}
            write_tensors(part / f"{name}.safetensors", name, own.tensors)
            return {name: {"rows": own.rows, "columns": own.columns}}

        def end(found: list[dict[str, Any]]) -> None:
            if not ranks.first:
                return
            log, checkpoint_log = None, checkpoints.log
            if checkpoint_log is not None:
                checkpoint_log.sync()
                size = checkpoint_log.size
                log = {"bytes": size, "sha256": sha256_of(checkpoint_log.file, size)}
            seconds = checkpoints.seconds_before + started - checkpoints._started
            values = {"parts": {k: v for one in found for k, v in one.items()}, **layout._asdict()}
            content = {
                **{"stage": checkpoints._stage, "step": step, "seconds": seconds},
                **{"values": values, "of": checkpoints.of, "log": log},
                "files": {file.name: sha256_of(file) for file in sorted(part.iterdir())},
            }
            write_json(part / "state.json", content)
            remove_folder(folder)
            os.replace(part, folder)
            sync_folder(checkpoints.folder)
            for old in checkpoints._saved_folders()[KEPT:]:
                remove_folder(old)

        self._done(folder, begin)
        found = self._done(folder, parts)
        self._done(folder, lambda: end(found))
        self._saved = step
        checkpoints._saved = time.monotonic()
        checkpoints._pause = max(checkpoints.seconds, SHARE * (checkpoints._saved - started))

    def _done(self, folder: FilePath, work: Callable[[], Any]) -> list[Any]:
        """What the work gave on all ranks; OSError on all if it could not be done on one."""
        result, error = None, ""
        try:
            result = work()
        except (OSError, ValueError) as caught:
            error = str(cannot_write(folder, caught)) if _numbered(caught) else str(caught)
        found = self._agreement.objects((result, error))
        for _, text in found:
            if text:
                if self._ranks.first:
                    part = folder.with_name(f".{folder.name}{PART}")
                    shutil.rmtree(part, ignore_errors=True)
                raise OSError(text)
        return [one for one, _ in found]


class Stored:
    """The control points in a state, of one process or of many ranks."""

    def __init__(self, folder: FilePath, values: Mapping[str, Any]):
        self._folder, self._parts = folder, values.get("parts")
        if self._parts is not None:
            self._layout = Layout(*(values[name] for name in Layout._fields))

    def controls(self, name: str) -> int:
        """How many there are between the ends, by a name of the path's interior."""
        if self._parts is not None:
            return self._layout.controls
        with safetensors.safe_open(self._folder / "path.safetensors", "pt") as stored:
            return stored.get_slice(f"interior/{name}").get_shape()[0]

    def rows(self, like: Mapping[str, Tensor], rows: range, group: str) -> dict[str, Tensor]:
        """name -> [K, ...] of the "interior" or the "velocity"; {} if there is no velocity.

        Args:
            like: name -> [...] of one network.
        """
        if self._parts is None:
            return self._of_one_process(like, rows, group)
        found = {}
        kind = "weight" if group == "interior" else group
        for number, names in enumerate(self._layout.side_by_side):
            sizes = [like[name].numel() for name in names]
            flat = self._flat(f"{kind}/{number}", rows, sum(sizes), number)
            if flat is None:
                continue
            for name, part in zip(names, flat.split(sizes, 1), strict=True):
                found[name] = part.reshape(len(rows), *like[name].shape)
        if group == "velocity":
            return found
        for name in like:
            first = self._layout.trained.get(name)
            if first is None:
                found[name] = self._not_trained(name, like[name], rows)
            else:
                found[name] = found[first]
        return found

    def _of_one_process(
        self, like: Mapping[str, Tensor], rows: range, group: str
    ) -> dict[str, Tensor]:
        file = "path" if group == "interior" else "state"
        with safetensors.safe_open(self._folder / f"{file}.safetensors", "pt") as stored:
            keys = set(stored.keys())
            return {
                name: stored.get_slice(f"{group}/{name}")[rows.start : rows.stop].clone()
                for name in like
                if f"{group}/{name}" in keys
            }

    def _flat(self, key: str, rows: range, width: int, number: int) -> Tensor | None:
        """[K, width] of what lies side by side; None if no part has it."""
        flat: Tensor | None = None
        for part, (top, bottom), columns in self._overlapping(rows):
            low, high = columns[number]
            with safetensors.safe_open(self._folder / f"{part}.safetensors", "pt") as stored:
                if key not in stored.keys():  # noqa: SIM118 - it is no mapping
                    continue
                first, last = max(top, rows.start), min(bottom, rows.stop)
                piece = stored.get_slice(key)[first - top : last - top]
                if flat is None:
                    flat = piece.new_empty(len(rows), width)
                flat[first - rows.start : last - rows.start, low:high] = piece
        return flat

    def _not_trained(self, name: str, like: Tensor, rows: range) -> Tensor:
        found = like.new_empty(len(rows), *like.shape)
        for part, (top, bottom), _ in self._overlapping(rows):
            with safetensors.safe_open(self._folder / f"{part}.safetensors", "pt") as stored:
                if f"interior/{name}" in stored.keys():  # noqa: SIM118
                    first, last = max(top, rows.start), min(bottom, rows.stop)
                    piece = stored.get_slice(f"interior/{name}")[first - top : last - top]
                    found[first - rows.start : last - rows.start] = piece
        return found

    def _overlapping(self, rows: range) -> list[tuple[str, list[int], list[list[int]]]]:
        assert self._parts is not None
        return [
            (name, part["rows"], part["columns"])
            for name, part in self._parts.items()
            if max(part["rows"][0], rows.start) < min(part["rows"][1], rows.stop)
        ]


def _state(folder: FilePath, content: Mapping[str, Any]) -> tuple[State, Stored]:
    """A state without its control points, and those to be read."""
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {}
    for kind in ("path", "state"):
        tensors[kind] = {}
        with safetensors.safe_open(folder / f"{kind}.safetensors", "pt") as stored:
            header = json.loads(stored.metadata()["fastgeo"])
            for group, names in header["order"]:
                if group not in LARGE:
                    tensors[kind][group] = {
                        name: stored.get_tensor(f"{group}/{name}").clone() for name in names
                    }
    generators = tensors["state"].pop("generators")
    state = State(content["step"], {**tensors}, content["values"], generators)
    return state, Stored(folder, content["values"])


def _numbered(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno is not None
