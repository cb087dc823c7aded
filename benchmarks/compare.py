"""Two result files side by side: `python -m benchmarks.compare BEFORE.json AFTER.json`.

Rows are the same if everything in them is that is not measured. A ratio above 1 means that AFTER
is faster; its range takes the quantiles of the two that are farthest apart.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from fastgeo.profiling.measure import QUANTILES, headline, table

IDENTITY = ("group", "setting", "implementation", "impl", "N, B, C", "dtype")


@dataclass(frozen=True)
class Options:
    """Ratios of times in two result files."""

    before: Positional[Path]
    """a file that `python -m benchmarks --json FILE` or a benchmark's --save wrote"""
    after: Positional[Path]
    """another"""


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each time that both results have.

    Raises:
        ValueError: they have no row in common.
    """
    old, new = (_times(result) for result in (before, after))
    rows = []
    for name in old.keys() & new.keys():
        one, other = old[name], new[name]
        low, middle, high = (
            one[a] / other[b] for a, b in zip(QUANTILES, reversed(QUANTILES), strict=True)
        )
        rows.append(
            {
                "what": name,
                "before, ms": one,
                "after, ms": other,
                "before/after (range)": f"{middle:.2f} ({low:.2f} to {high:.2f})",
                "": "faster" if low > 1 else "slower" if high < 1 else "no difference",
            }
        )
    if not rows:
        raise ValueError("the two files have no row in common")
    return sorted(rows, key=lambda row: list(old).index(row["what"]))


def _times(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What was timed -> its quantiles, ms."""
    found = {}
    for row in result["rows"]:
        name = ": ".join(str(row[key]) for key in IDENTITY if key in row)
        for column in ("ms", "ms a step"):
            if isinstance(row.get(column), dict):
                found[name] = row[column]
    return found


def main() -> None:
    options = tyro.cli(Options, prog="python -m benchmarks.compare")
    try:
        results = [json.loads(file.read_text()) for file in (options.before, options.after)]
        rows = compare(*results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"cannot compare {options.before} and {options.after}: {error}") from error
    for name, result in zip(("before", "after"), results, strict=True):
        print(f"{name}: {headline(result['environment'])}")
    print(table(rows))


if __name__ == "__main__":
    main()
