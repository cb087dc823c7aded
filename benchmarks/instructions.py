"""How many instructions the path divergence takes for each class and edge, in compiled code.

Counted in what NVIDIA's assembler made of the loop over edges: all that a program issues there, the
sums over a row and the addresses as well, spread over the classes that the program has.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Count(NamedTuple):
    """Instructions an element and edge, of threads: 32 are one instruction of a warp.

    Attributes:
        always: what an edge takes; where registers hold its rows, one that is near, whose
            |log p - log q| is below 1 for all classes.
        again: what another edge takes besides, whose sums are taken in another way or once more.
    """

    always: float
    again: float


class Span(NamedTuple):
    """Instructions of a program, from one up to but not with another."""

    start: int
    end: int

    def holds(self, other: Span) -> bool:
        return self != other and self.start <= other.start and other.end <= self.end


def dump(cubin: bytes, option: str) -> str:
    """What cuobjdump says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count(cubin: bytes, threads: int, rows: int, classes: int, at_once: int = 1) -> Count:
    """Of a program that walks along the edges of `rows` rows, `at_once` in a round of its loop.
    Without a loop it has one edge of its own, and all that it does is counted."""
    lines = instructions(cubin)
    jumps = [(at, target) for at, line in enumerate(lines) if (target := _target(line)) is not None]
    loops = [Span(target, at + 1) for at, target in jumps if target < at]
    walk = max(loops, key=lambda loop: loop.end - loop.start, default=Span(0, len(lines)))
    sweeps = [loop for loop in loops if walk.holds(loop)]
    skipped = [Span(at + 1, target) for at, target in jumps if target > at]
    rare = [
        span
        for span in skipped
        if walk.holds(span) and not any("STG" in line for line in lines[span.start : span.end])
    ]

    def among(parts: list[Span]) -> float:
        """Instructions of these parts, those in a sweep as often as it goes round."""
        total = 0.0
        for at in {at for part in parts for at in range(part.start, part.end)}:
            own = [loop for loop in sweeps if loop.start <= at < loop.end]
            total += classes / _step(lines[own[0].start : own[0].end]) if own else 1
        return total * threads / (rows * classes * (at_once if loops else 1))

    # Of two ways to the same end the second is jumped over at the end of the first.
    first = [span for span in rare if any(span.end == other.start for other in rare)]
    others = among([span for span in rare if span not in first])
    return Count(among([walk]) - others, others - among(first))


def instructions(cubin: bytes) -> list[str]:
    """The program, one line each, jumps with the numbers of lines in place of addresses."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", dump(cubin, "-sass"), re.MULTILINE)
    lines = {int(address, 16): line for address, line in found}
    numbers = {address: number for number, address in enumerate(lines)}

    def numbered(match: re.Match) -> str:
        return f"BRA {numbers[int(match[1], 16)]}"

    program = [re.sub(r"BRA\S* .*?\b0x([0-9a-f]+)", numbered, line) for line in lines.values()]
    # A program ends with a jump to itself, and then fills a line of the cache.
    return program[: next(at for at, line in enumerate(program) if _target(line) == at)]


def _target(line: str) -> int | None:
    match = re.search(r"\bBRA (\d+)$", line)
    return int(match[1]) if match else None


def _step(loop: list[str]) -> int:
    """By how much the number that a sweep compares with its end grows in one round."""
    compared = set(re.findall(r"ISETP\S* P\d, PT, (U?R\d+)\S*, 0x", "\n".join(loop)))
    for line in loop:
        match = re.search(r"IADD3 (U?R\d+), (?:U?P\d, )?\1(?:\.reuse)?, 0x([0-9a-f]+)", line)
        if match and match[1] in compared:
            return int(match[2], 16)
    raise ValueError("a sweep over classes whose step is not known")
