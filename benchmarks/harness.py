"""What every benchmark shares: the machine, interleaved timing, quantiles, the results file."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, str | int]:
    """The machine and the versions a number belongs to."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": command(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": _driver() if cuda else "none",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }


def headline(environment: dict) -> str:
    """The environment on one line, to print above a table."""
    return ", ".join(f"{key} {value}" for key, value in environment.items() if key != "command")


def device_slug() -> str:
    """The device as a part of a file name: `cpu`, `nvidia-h100-80gb-hbm3`."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def command() -> str:
    """What was typed, without the path of the interpreter."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def version_of(package: str) -> str:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return "none"
    from importlib.metadata import version

    return version(package)


def time_alternating(
    functions: dict[str, Callable[[], object]], repeats: int, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds a call of each function, `repeats` times, the functions taking turns.

    Taking turns in one run gives every function the same share of whatever else the machine does.

    Args:
        functions: name -> a function without arguments. Each is called twice beforehand.
        repeats: rounds; the order is reversed in every second one.
        clock: "wall" waits for the device before and after each call; "device" is the time that
            the device itself spends (CUDA events behind a pause that lets the host run ahead).
    """
    if clock not in ("wall", "device"):
        raise ValueError(f"clock must be 'wall' or 'device', got {clock!r}")
    if clock == "device" and not torch.cuda.is_available():
        raise ValueError("clock='device' needs a GPU")
    for function in functions.values():
        function()
    host_seconds = {name: _wall_seconds(function) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            names = list(functions) if turn % 2 == 0 else list(functions)[::-1]
            for name in names:
                if clock == "wall":
                    seconds[name].append(_wall_seconds(functions[name]))
                else:
                    seconds[name].append(_device_seconds(functions[name], host_seconds[name]))
    finally:
        if collecting:
            gc.enable()
    return seconds


def quantiles(seconds: Iterable[float]) -> dict[str, float]:
    """p20, p50 and p80, in the unit that came in."""
    values = torch.tensor(list(seconds), dtype=torch.float64)
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return dict(zip(("p20", "p50", "p80"), values.quantile(levels).tolist(), strict=True))


def copy_bandwidth(numel: int, device: str | torch.device, repeats: int = 20) -> float:
    """Bytes a second of a copy of `numel` fp32 numbers on the device: one read and one write."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    clock = "device" if source.is_cuda else "wall"
    seconds = time_alternating({"copy": lambda: target.copy_(source)}, repeats, clock)
    return 2 * source.nbytes / quantiles(seconds["copy"])["p50"]


def table(rows: list[dict[str, object]]) -> str:
    """Rows of equal keys as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_result(name: str, payload: dict) -> Path:
    """Writes `benchmarks/results/<name>.json`, the environment first."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **payload}, indent=1) + "\n")
    return path


def _wall_seconds(function: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _device_seconds(function: Callable[[], object], host_seconds: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device spins while the host queues everything, so no gap between launches is counted.
    torch.cuda._sleep(int(2e9 * min(2 * host_seconds + 1e-3, 0.1)))
    start.record()
    function()
    end.record()
    _synchronize()
    return start.elapsed_time(end) / 1e3


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    return found[0] if found else "unknown"


def _cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
