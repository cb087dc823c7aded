"""What the machine is and what it can reach; and whether all tests for GPUs pass on it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.device_parts.given import Given
from benchmarks.harness import device_slug, environment
from fastgeo.profiling.measure import copy_bandwidth, matmul_rate

ROOT = Path(__file__).parents[2]
LAST = 10.0  # seconds that pytest gets to say what failed
EXIT_NOTHING = 5  # pytest's exit status where no test is left


def machine(given: Given) -> Iterator[dict[str, Any]]:
    """Versions; bytes a second of a copy, and FLOP a second of a bf16 product."""
    row: dict[str, Any] = environment() | {"slug": device_slug()}
    if given.gpu:
        chip = torch.cuda.get_device_properties(given.device)
        row |= {
            "capability": f"{chip.major}.{chip.minor}",
            "multiprocessors": chip.multi_processor_count,
            "L2, bytes": chip.L2_cache_size,
            "memory, bytes": chip.total_memory,
            "cuDNN": torch.backends.cudnn.version(),
            "CUDA": torch.version.cuda,
        }
    yield row
    yield {"bytes a second": copy_bandwidth(given.sizes.numbers, given.device)}
    dtype = torch.bfloat16 if given.gpu else torch.float32
    yield {"FLOP a second": matmul_rate(given.device, dtype)}


def tests(given: Given) -> Iterator[dict[str, Any]]:
    """As many of `pytest -m gpu` as there is time for; without a GPU they are read only."""
    log = given.folder / "pytest.log"
    options = ["-m", "gpu", "-v", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    if given.gpu and find_spec("xdist"):
        options += ["-n", "8", "--dist", "worksteal"]
    with log.open("w") as file:
        pytest = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options], cwd=ROOT, stdout=file, stderr=file
        )
        try:
            status = pytest.wait(given.left() - 2 * LAST)
        except subprocess.TimeoutExpired:
            status = None
            pytest.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                pytest.wait(LAST)
    lines = log.read_text().splitlines()
    row: dict[str, Any] = {"passed": sum(" PASSED" in line for line in lines)}
    row["not"] = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    row["finished"] = status is not None
    if row["not"]:
        row["failed"] = row["not"][0]
    elif status not in (None, 0 if given.gpu else EXIT_NOTHING):
        row["failed"] = f"exit status {status}: {' '.join(lines[-3:])}"
    yield row
