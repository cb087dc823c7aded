"""All that is to be known of a GPU, in a quarter of an hour: one command, nine minutes of it.

    python -m benchmarks.device --minutes 9 --out FOLDER     # on the GPU
    python -m benchmarks.device --merge FOLDER/records.jsonl # anywhere, from a clone

It needs Python with torch, triton and numpy, and a clone. The parts run one after the other, each
in a process of its own with a deadline of its own, so that one that fails or hangs costs itself
only. Every row is in the file before the next is measured. `--merge` makes the results file, the
lines of `conv_table.py` and tables of it.

`--cache FOLDER` takes kernels that `python -m benchmarks.precompile` has compiled. `--dry-run` does
all of it in small on a CPU, with Triton's interpreter in place of a GPU and eager steps in place
of CUDA graphs.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.device_parts.given import Given

LINES = 12  # of what a part said last, kept where it did not end well
WORTH = 0.4  # of its time that has to be left for a part to begin


@dataclass(frozen=True)
class Part:
    """What is measured in one process.

    Attributes:
        seconds: that it has; what is left, for the last.
        run: gives rows; one that says how it "failed" fails the part, when all are there.
    """

    name: str
    seconds: float
    run: Callable[[Given], Iterator[dict[str, Any]]]


def parts() -> list[Part]:
    """In the order of what matters most if time runs out."""
    from benchmarks.device_parts import kernels, machine, steps

    return [
        Part("machine", 15, machine.machine),
        Part("kernels", 60, kernels.right),
        Part("divergence", 40, kernels.divergence),
        Part("convolutions", 100, kernels.convolutions),
        Part("step", 110, steps.step),
        Part("precision", 40, steps.precision),
        Part("compiled", 90, steps.compiled),
        Part("tests", 60, machine.tests),
    ]


def run(part: Part, given: Given) -> dict[str, Any]:
    """The part's end: status, seconds, and why it is not ok in the last lines that it said."""
    log = given.folder / "log.txt"
    before = log.stat().st_size if log.exists() else 0
    process = multiprocessing.get_context("fork").Process(target=_inside, args=(part, given, log))
    process.start()
    process.join(given.left())
    late = process.is_alive()
    process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it has started
    process.join(10)
    end = {"part": part.name, "seconds": round(time.monotonic() - given.started, 1)}
    if not late and process.exitcode == 0:
        return end | {"status": "ok"}
    said = log.read_bytes()[before:].decode(errors="replace").splitlines() if log.exists() else []
    if late:  # the stack of the main thread, the last of them, begins where it hung
        stacks = [i for i, line in enumerate(said) if "(most recent call first)" in line]
        return end | {"status": "timed out", "why": said[stacks[-1] :][:LINES] if stacks else []}
    why = said[-LINES:] or [f"exit status {process.exitcode}"]
    return end | {"status": "failed", "why": why}


def _inside(part: Part, given: Given, log: Path) -> None:
    """What the part's own process does; where it hangs is said just before its deadline."""
    import faulthandler

    from benchmarks import precompile
    from benchmarks.device_parts import records

    os.setsid()
    said = log.open("a", buffering=1)
    for stream in (1, 2):
        os.dup2(said.fileno(), stream)
    sys.stdout = sys.stderr = said
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(given.left() - 1, 0.1))
    kernels, failed = precompile.Compilations(), []
    for row in part.run(given):
        records.write(given.folder, part=part.name, row=row)
        failed += [row["failed"]] if row.get("failed") else []
    records.write(given.folder, part=part.name, compiled=kernels.compiled, found=kernels.found)
    if failed:
        raise SystemExit(f"{len(failed)} rows failed, the first of them: {failed[0]}")


def measure(folder: Path, *, minutes: float, dry: bool, only: list[str]) -> bool:
    """Runs the parts; whether all are ok."""
    from benchmarks.device_parts import given, records

    began, ok = time.monotonic(), True
    device, sizes = ("cpu", given.TINY) if dry else ("cuda", given.Sizes())
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts() if part.name in only] if only else parts()
    for part in chosen:
        left = began + 60 * minutes - time.monotonic()
        last = part is chosen[-1] and part.name == "tests"
        seconds = left if last or dry else min(part.seconds, left)
        if left < WORTH * part.seconds:
            end: dict[str, Any] = {"part": part.name, "status": "left out", "seconds": 0}
        else:
            end = run(part, given.Given(device, sizes, folder, seconds, time.monotonic()))
        records.write(folder, **end)
        print(f"{part.name}: {end['status']}, {end['seconds']} s", flush=True)
        print(*end.get("why", []), sep="\n", end="\n" if end.get("why") else "", flush=True)
        ok = ok and end["status"] == "ok"
    return ok


def prepare(cache: Path | None, dry: bool) -> None:
    """What has to be so before torch and triton are imported."""
    if find_spec("fastgeo_kernels") is None:
        own = str(Path(__file__).parents[1] / "kernels" / "torch-ext")
        sys.path.insert(0, own)
        os.environ["PYTHONPATH"] = os.pathsep.join([own, os.environ.get("PYTHONPATH", "")])
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # or asking for a GPU here spoils a fork
    if dry:
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    if cache is not None:
        from benchmarks import precompile

        precompile.take(cache)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=9, help="after which all is over")
    parser.add_argument("--out", type=Path, help="folder for records.jsonl and what parts said")
    parser.add_argument("--part", action="append", default=[], help="run this one alone")
    parser.add_argument("--cache", type=Path, help="of kernels, from benchmarks.precompile")
    parser.add_argument("--dry-run", action="store_true", help="in small, on a CPU")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="records to make results of")
    arguments = parser.parse_args()
    if arguments.merge:
        prepare(None, dry=False)
        from benchmarks.device_parts import tables

        return tables.merge(arguments.merge)
    if arguments.out is None:
        parser.error("--out FOLDER is needed")
    prepare(arguments.cache, arguments.dry_run)
    names = [part.name for part in parts()]
    if unknown := set(arguments.part) - set(names):
        parser.error(f"--part must be one of {', '.join(names)}, got {', '.join(unknown)}")
    ok = measure(
        arguments.out.absolute(),
        minutes=arguments.minutes,
        dry=arguments.dry_run,
        only=arguments.part,
    )
    from benchmarks.device_parts import records, tables

    print(tables.text(records.read(arguments.out / records.FILE)))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
