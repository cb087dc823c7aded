"""Times of everything, in one table: `python -m benchmarks`, a few minutes on a CPU.

Implementations of the same thing take turns in one process, and each is compared with the first of
them, in its result and in its time. One whose result is another is called wrong, and has no time.
"""

import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.cases import Case, cases, error
from benchmarks.harness import device_slug, environment, printed, write_result
from fastgeo import keep_pages
from fastgeo.profiling.measure import headline, quantiles, time_alternating
from fastgeo.stacking.precision import matmul_precision

SPEED = "times as fast as the first, slower below 1"


@dataclass(frozen=True)
class Options:
    """Times fastgeo's operations beside what they stand in for."""

    full: bool = False
    """the long set; the quick one by default"""
    group: str | None = None
    """one of divergence, layers, step, evaluation, matching; all by default"""
    repeats: int = 7
    """measurements of each"""
    json: Path | None = None
    """write the rows to this file, for python -m benchmarks.compare"""
    save: bool = False
    """write benchmarks/results/benchmarks-DEVICE.json"""


def measure(same: list[Case], repeats: int) -> list[dict[str, Any]]:
    """A row for each of the implementations of one thing."""
    with matmul_precision("fp32"):  # a GPU's default for convolutions is TF32
        expected = same[0].run()
        errors = {case.implementation: error(case.run(), expected) for case in same}
    sound = {c.implementation: c for c in same if errors[c.implementation] <= c.tolerance}
    seconds = time_alternating({name: case.run for name, case in sound.items()}, repeats)
    first = same[0].implementation
    rows = []
    for case in same:
        name, unit = case.implementation, f"{case.unit}/s"
        row: dict[str, Any] = dict(group=case.group, setting=case.setting, implementation=name)
        if name in sound:
            times = quantiles(seconds[name])
            row["ms"] = {level: 1e3 * s / case.count for level, s in times.items()}
            row["rate"] = f"{case.work / times['p50']:.3g} {unit}"
            pairs = zip(seconds[first], seconds[name], strict=True)
            row[SPEED] = quantiles(one / other for one, other in pairs)
        else:
            row |= dict.fromkeys(("ms", "rate", SPEED), "wrong")
        rows.append(row | {"difference": f"{errors[name]:.0e}"})
    return rows


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks")
    keep_pages()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(headline(environment()), flush=True)
    key = functools.cache(lambda case: (case.group, case.setting))
    rows = printed(
        measure(list(same), options.repeats)
        for (group, _), same in itertools.groupby(cases(device, full=options.full), key)
        if options.group in (None, group)
    )
    if not rows:
        raise SystemExit(f"there is no group {options.group!r}")
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    if options.save:
        print(f"\nwrote {write_result(f'benchmarks-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
