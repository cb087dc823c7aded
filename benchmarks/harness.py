"""What every benchmark shares: what a number belongs to, and the results file."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from fastgeo.profiling.measure import machine, table

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str | int]:
    """The machine, the versions, the code and the command that a number belongs to."""
    when = {"date": datetime.now(UTC).date().isoformat(), "command": command()}
    return when | {"commit": _commit()} | machine()


def device_slug() -> str:
    """The device as a part of a file name: `cpu`, `nvidia-h100-80gb-hbm3`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def command() -> str:
    """What was typed, without the path of the interpreter."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def printed(parts: Iterable[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """All rows, printed as one table that grows by a part as soon as the part is measured."""
    rows: list[dict[str, Any]] = []
    for part in parts:
        lines = table(part).splitlines()
        print(*lines[2 if rows else 0 :], sep="\n", flush=True)
        rows += part
    return rows


def write_result(name: str, payload: dict) -> Path:
    """Writes `benchmarks/results/<name>.json`, the environment first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **payload}, indent=1) + "\n")
    return path


class Kept:
    """Results in a file, a line each, from which a benchmark that was stopped goes on.

    Args:
        file: where they are; made if it is not there.
        own: settings, which its first line holds.

    Attributes:
        lines: those that were there.

    Raises:
        ValueError: it holds results of other settings.
    """

    def __init__(self, file: Path, own: dict[str, Any]):
        self.file = file
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            self.add(own)
        first, *self.lines = map(json.loads, file.read_text().splitlines())
        if first != own:
            raise ValueError(f"{file} holds results of {first}, not of {own}")

    def add(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _commit() -> str:
    """The short hash of HEAD, with `+` where tracked files differ from it."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        sources = [":/", ":(top,exclude)benchmarks/results"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *sources])
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.returncode else "")
