"""Records of a run: a file with one JSON object a line, each whole as soon as it is written.

A part's rows are {"part", "row"}; behind them come {"part", "compiled", "found"}, how many kernels
Triton had to compile and how many were in its cache, and {"part", "status", "seconds", "why"}:
status is ok, failed, timed out or left out, why the last lines that the part had to say.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE = "records.jsonl"


def write(folder: Path, **record: Any) -> None:
    """Appends a record and hands it to the system."""
    with (folder / FILE).open("a") as file:
        file.write(json.dumps(record, default=str) + "\n")


def read(file: Path) -> list[dict[str, Any]]:
    """All whole records, none where there is no file; the last line may have been cut short."""
    found: list[dict[str, Any]] = []
    if not file.exists():
        return found
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def rows(records: list[dict[str, Any]], part: str) -> list[dict[str, Any]]:
    """Those of the last time that a part ran."""
    found: list[dict[str, Any]] = []
    ended = False
    for record in records:
        if record["part"] == part and "row" in record:
            found = [*([] if ended else found), record["row"]]
            ended = False
        elif record["part"] == part and record.get("status", "left out") != "left out":
            ended = True
    return found


def ends(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Part -> how it ended, the last time."""
    return {record["part"]: record for record in records if "status" in record}
