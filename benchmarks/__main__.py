"""Times of everything, in one table: `python -m benchmarks`, a few minutes on a CPU.

Implementations of the same thing take turns in one process. One whose result is not that of the
first is called wrong, and has no time.
"""

import functools
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.cases import Case, cases, error
from benchmarks.harness import device_slug, environment, write_result
from fastgeo import keep_pages
from fastgeo.profiling.measure import headline, quantiles, table, time_alternating
from fastgeo.stacking.precision import matmul_precision


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
            row["ms"] = {level: 1e3 * s for level, s in times.items()}
            row["rate"] = f"{case.work / times['p50']:.3g} {unit}"
            pairs = zip(seconds[first], seconds[name], strict=True)
            row["times the first"] = quantiles(one / other for one, other in pairs)
        else:
            row |= dict.fromkeys(("ms", "rate", "times the first"), "wrong")
        rows.append(row | {"difference": f"{errors[name]:.0e}"})
    return rows


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks")
    keep_pages()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(headline(environment()), flush=True)
    rows = []
    key = functools.cache(lambda case: (case.group, case.setting))
    for (group, setting), same in itertools.groupby(cases(device, full=options.full), key):
        if options.group in (None, group):
            print(f"{group}: {setting}", file=sys.stderr)
            rows += measure(list(same), options.repeats)
    if not rows:
        raise SystemExit(f"there is no group {options.group!r}")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))
    if options.save:
        print(f"\nwrote {write_result(f'benchmarks-{device_slug()}', {'rows': rows})}")


if __name__ == "__main__":
    main()
