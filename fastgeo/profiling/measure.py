"""Times, rates and memory, measured so that they can be compared."""

import contextlib
import gc
import importlib.util
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path as FilePath
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

STAT = FilePath("/proc/stat")
QUANTILES = ("p20", "p50", "p80")


def machine() -> dict[str, str | int]:
    """The machine and the versions that a number belongs to."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": _driver() if cuda else "none",
        "cpu": cpu_name(),
        "cores": len(usable_cores()),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
    }


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class OtherLoad:
    """How many of the cores that this process may use others keep busy, from when it is made."""

    def __init__(self) -> None:
        self._started, self._own, self._all = time.perf_counter(), time.process_time(), _busy()

    def cores(self) -> float:
        """On average until now; 0 where the system does not tell (it does on Linux)."""
        seconds, own = time.perf_counter() - self._started, time.process_time() - self._own
        return max(_busy() - self._all - own, 0) / seconds


def _busy() -> float:
    """Seconds that all processes together have spent on those cores."""
    names = {f"cpu{core}" for core in usable_cores()}
    try:
        lines = [line.split() for line in STAT.read_text().splitlines()]
    except OSError:
        return 0.0
    ticks = 0
    for name, *counts in lines:
        if name in names:
            user, nice, system, _, _, *interrupts = map(int, counts)  # idle, and idle with a disk
            ticks += user + nice + system + sum(interrupts[:2])
    return ticks / os.sysconf("SC_CLK_TCK")


def headline(environment: dict) -> str:
    """The environment on one line, to print above a table."""
    return ", ".join(f"{key} {value}" for key, value in environment.items() if key != "command")


def version_of(package: str) -> str:
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        return "none"
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"  # but found, as in a working copy


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
    host_seconds = {name: wall_seconds(function) for name, function in functions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(repeats):
            names = list(functions) if turn % 2 == 0 else list(functions)[::-1]
            for name in names:
                if clock == "wall":
                    seconds[name].append(wall_seconds(functions[name]))
                else:
                    seconds[name].append(_device_seconds(functions[name], host_seconds[name]))
    finally:
        if collecting:
            gc.enable()
    return seconds


def wall_seconds(function: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    start = now()
    function()
    return now() - start


def now() -> float:
    """Seconds on the wall clock, when the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def quantiles(values: Iterable[float]) -> dict[str, float]:
    """p20, p50 and p80, in the unit that came in."""
    values = torch.tensor(list(values), dtype=torch.float64)
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return dict(zip(QUANTILES, values.quantile(levels).tolist(), strict=True))


def copy_bandwidth(numel: int, device: str | torch.device, repeats: int = 20) -> float:
    """Bytes a second of a copy of `numel` fp32 numbers on the device: one read and one write."""
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    clock = "device" if source.is_cuda else "wall"
    seconds = time_alternating({"copy": lambda: target.copy_(source)}, repeats, clock)
    return 2 * source.nbytes / quantiles(seconds["copy"])["p50"]


def matmul_rate(
    device: str | torch.device, dtype: torch.dtype = torch.float32, repeats: int = 10
) -> float:
    """FLOP a second of a large square matrix product, 2 n^3 each."""
    n = 8192 if torch.device(device).type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    clock = "device" if out.is_cuda else "wall"
    seconds = time_alternating({"matmul": lambda: torch.mm(a, b, out=out)}, repeats, clock)
    return 2 * n**3 / quantiles(seconds["matmul"])["p50"]


def flops_of(function: Callable[[], object]) -> int:
    """FLOP of the convolutions and matrix products in one call, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that a call holds beyond what was held before: tensors on the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _silent(), recorded(profile_memory=True) as recorder:
        function()
    profiler: Any = recorder.profiler  # no public type has the events of memory
    changes = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@contextlib.contextmanager
def recorded(*, profile_memory: bool = False) -> Iterator[profile]:
    """torch.profiler.profile of host and device."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    recorder = profile(activities=activities, profile_memory=profile_memory)
    with _silent():
        recorder.start()
    try:
        yield recorder
    finally:
        with _silent():
            recorder.stop()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Standard error closed for a while: the profiler's library logs its starts and stops there."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def table(rows: list[dict[str, object]]) -> str:
    """Rows of equal keys as a Markdown table; quantiles as p20/p50/p80."""
    head = [key + _levels(rows[0][key]) for key in rows[0]]
    body = ([_cell(row[key]) for key in rows[0]] for row in rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _levels(value: object) -> str:
    return f" ({'/'.join(QUANTILES)})" if isinstance(value, dict) else ""


def _cell(value: object) -> str:
    if isinstance(value, dict):
        return "/".join(_cell(value[level]) for level in QUANTILES)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _device_seconds(function: Callable[[], object], host_seconds: float) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device spins while the host queues everything, so no gap between launches is counted.
    torch.cuda._sleep(int(2e9 * min(2 * host_seconds + 1e-3, 0.1)))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    return found[0] if found else "unknown"


def cpu_name() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", FilePath("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
