"""Tables of the records of `benchmarks.device`, for a terminal, for results and for documents."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgeo_kernels.stacked.conv_table import Shape, Ways

from benchmarks import step_gpu
from benchmarks.device_parts import kernels, records
from benchmarks.harness import RESULTS
from fastgeo.profiling.measure import table

Row = dict[str, Any]
Rows = dict[str, list[Row]]  # part -> rows
LINES = 25  # of the kernels of a step


def merge(file: Path) -> None:
    """Writes `benchmarks/results/device-NAME.json`, and prints its tables and what to do with them.

    Raises:
        SystemExit: records without those of the machine.
    """
    found = records.read(file)
    rows = {part: records.rows(found, part) for part in records.ends(found)}
    if not rows.get("machine"):
        raise SystemExit(f"{file} has no records of the machine")
    environment = rows["machine"][0]
    name = f"device-{environment['slug']}"
    result = {"environment": environment, "parts": records.ends(found), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(text(found))
    print(f"\nwrote {RESULTS / name}.json; a document gets its tables as:")
    print(*(f"<!-- table: {name} {section} -->" for section in SECTIONS), sep="\n")


def text(found: list[Row]) -> str:
    """All that there is to say, in Markdown, and the lines for conv_table.py."""
    ends = records.ends(found)
    parts = [
        {"part": part, "status": end["status"], "seconds": end["seconds"]}
        for part, end in ends.items()
    ]
    rows = {part: records.rows(found, part) for part in ends}
    sections = [table(parts), *(made for make in SECTIONS.values() if (made := make(rows)))]
    return "\n\n".join([*sections, conv_table(rows)]).rstrip()


def machine(rows: Rows) -> str:
    known = of_machine(rows)
    if not known:
        return ""
    environment = rows["machine"][0]
    return (
        f"{environment['device']}, torch {environment['torch']}, triton {environment['triton']}: "
        f"{known['bytes a second'] / 1e9:.0f} GB/s copied, {known['FLOP a second'] / 1e12:.3g} "
        "TFLOP/s of a large product."
    )


def of_machine(rows: Rows) -> Row:
    """What the machine reaches; empty if that is not known."""
    known = {key: value for row in rows.get("machine", []) for key, value in row.items()}
    return known if "bytes a second" in known and "FLOP a second" in known else {}


def correctness(rows: Rows) -> str:
    cases = rows.get("kernels", [])
    wrong = [row for row in cases if "failed" in row]
    lines = [f"{len(cases) - len(wrong)} of {len(cases)} kernel cases are right."] if cases else []
    lines += [f"* {row['case']}: {row['failed']}" for row in wrong]
    for row in rows.get("tests", []):
        how = "all that there are" if row["finished"] else "until the time was over"
        lines.append(f"Tests for GPUs, {how}: {row['passed']} passed, {len(row['not'])} not.")
        lines += [f"* {line}" for line in row["not"]]
    return "\n".join(lines)


def divergence(rows: Rows) -> str:
    """us of value and gradient, with the logits in the caches ("warm") and not."""
    shapes: dict[tuple, dict[tuple, Row]] = {}
    for row in rows.get("divergence", []):
        shapes.setdefault(tuple(row["N, B, C"]), {})[row["way"], row.get("cold")] = row
    lines = []
    for shape, ways in shapes.items():
        took = {way: row["ms"]["p50"] for way, row in ways.items() if "ms" in row}
        ours, copy = took.get(("Triton", True)), took.get(("copy", True))
        warm, loop = took.get(("Triton", False)), took.get(("paper's loop", False))
        lines.append(
            {
                "N, B, C": ", ".join(map(str, shape)),
                "us, cold": number(ours and 1e3 * ours),
                "us, warm": number(warm and 1e3 * warm),
                "a copy, cold": number(copy and 1e3 * copy),
                "share of the copy's rate": f"{copy / ours:.0%}" if ours and copy else "-",
                "times the paper's loop, warm": number(loop and warm and loop / warm),
                "error": number(max((row.get("error", 0) for row in ways.values()), default=None)),
            }
        )
    return table(lines) if lines else ""


def convolutions(rows: Rows) -> str:
    """ms of every product in every way, cuDNN searching for its plan or not."""
    cells: dict[tuple, dict[bool, Row]] = {}
    for row in rows.get("convolutions", []):
        key = (tuple(row["shape"]), row["product"], row["way"])
        cells.setdefault(key, {})[row["search"]] = row
    lines = []
    for (shape, product, way), cell in cells.items():
        took = {search: row["ms"]["p50"] for search, row in cell.items() if "ms" in row}
        why = {row["failed"][:60] for row in cell.values() if "failed" in row}
        best = min(took.values(), default=None)
        flop = next(iter(cell.values()))["flop"]
        lines.append(
            {
                "size, stride, C, O, pixels": ", ".join(map(str, shape)),
                "product": product,
                "way": way,
                "ms": number(took.get(False)),
                "ms, searched": number(took.get(True)),
                "TFLOP/s": number(best and flop / best / 1e9),
                "why not": "; ".join(sorted(why)) or "-",
            }
        )
    return table(lines) if lines else ""


def conv_table(rows: Rows) -> str:
    """Lines for conv_table.py."""
    best = kernels.best_table(rows.get("convolutions", []))
    if best is None:
        return ""
    lines = [f"    {Shape(*shape)!r}: {Ways(*ways)!r}," for shape, ways in best["table"]]
    how = f"cudnn.benchmark {'on' if best['search'] else 'off'}"
    head = (
        f"For conv_table.py, images of {best['layout']}, {how}, {best['ms a step']:.3g} ms a step:"
    )
    return "\n".join([head, "", *lines])


def step(rows: Rows) -> str:
    """The step in every way, and the kernels of ours."""
    timed = [row for part in ("step", "compiled") for row in rows.get(part, []) if "name" in row]
    if not timed:
        return ""
    rate = of_machine(rows).get("FLOP a second", math.nan)
    measured = [
        step_gpu.Measured(
            ", ".join([row["name"], *([row["how"]] if "how" in row else [])]),
            row["seconds"],
            row["errors"],
            row["peak"],
            row["failed"],
        )
        for row in timed
    ]
    return table(step_gpu.rows(measured, timed[0]["flop"], rate))


def replay(rows: Rows) -> str:
    """The kernels of our step by their time."""
    found = [row for row in rows.get("step", []) if "kernel" in row]
    total = sum(row["us"] for row in found)
    lines = [
        {
            "kernel": row["kernel"][:90].replace("|", "/"),
            "calls": row["calls"],
            "ms": number(row["us"] / 1e3),
            "share": f"{row['us'] / total:.1%}",
        }
        for row in found[:LINES]
    ]
    return table(lines) if lines else ""


def precision(rows: Rows) -> str:
    """Energies of steps in bf16 and fp32."""
    found = {row["run"]: row for row in rows.get("precision", [])}
    if "fp32" not in found:
        return ""
    exact = found["fp32"]["energies"]
    lines = []
    for run, row in found.items():
        pairs = list(zip(row["energies"], exact, strict=False))
        off = sum(abs(one - other) for one, other in pairs) / len(pairs) if pairs else None
        lines.append(
            {
                f"{len(exact)} steps": run,
                "first energy, nats": number(pairs[0][0] if pairs else None),
                "last": number(pairs[-1][0] if pairs else None),
                "mean distance from fp32": number(off),
                "distance of the points": number(row["from fp32"]),
            }
        )
    return table(lines)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


SECTIONS: dict[str, Callable[[Rows], str]] = {
    "machine": machine,
    "correctness": correctness,
    "divergence": divergence,
    "convolutions": convolutions,
    "step": step,
    "replay": replay,
    "precision": precision,
}
