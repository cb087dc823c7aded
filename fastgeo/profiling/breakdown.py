"""Where the time of an optimisation step goes, and what limits it."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

from torch import nn
from torch.autograd import DeviceType

from fastgeo.data.inputs import Passes, on_device
from fastgeo.forward.options import Forward
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.profiling.compare import fastest_matmul, step_flops
from fastgeo.profiling.measure import now, recorded, table
from fastgeo.step.descent import Descent
from fastgeo.step.phases import PHASES

MATRIX = ("conv", "mm", "gemm", "cutlass", "xmma", "linear")  # in the names of operations


@dataclass(frozen=True)
class Breakdown:
    """What `breakdown` returns; all times are of one step.

    Attributes:
        ms: wall time.
        phases: name -> ms, on the device where there is one; "other" is what is left of a step.
        kernels: (operation, ms, calls) of the operations that take longest.
        limit: what limits the step, in one sentence.
    """

    ms: float
    phases: dict[str, float]
    kernels: list[tuple[str, float, float]]
    limit: str

    def __repr__(self) -> str:
        phases = [
            {"phase": name, "ms a step": ms, "share": f"{ms / self.ms:.0%}"}
            for name, ms in self.phases.items()
        ]
        kernels = [
            {"operation": name, "ms a step": ms, "share": f"{ms / self.ms:.0%}", "calls": calls}
            for name, ms, calls in self.kernels
        ]
        return f"{table(phases)}\n\n{table(kernels)}\n\n{self.limit}"


def breakdown(
    module: nn.Module,
    path: Path,
    batches: Iterable,
    *,
    descent: Descent,
    forward: Forward,
    steps: int = 5,
    trace: FilePath | None = None,
) -> Breakdown:
    """Where the time of a step goes.

    Args:
        module: the network of all points, in eval mode.
        path: where the first step starts.
        batches: as in `fastgeo.optimize`, at least steps + 2 of them.
        descent: how to descend, from all points at a constant rate.
        forward: how networks are evaluated, with an engine that is named.
        steps: how many are recorded, after two that are not.
        trace: write a trace for chrome://tracing or ui.perfetto.dev here.
    """
    inputs = Passes(batches, repeat=True)
    how: dict[str, Any] = dict(descent=descent, forward=forward, cuda_graph=False)
    floor = step_flops(module, path, on_device(next(inputs)[0], path.device))
    floor = 1e3 * floor / fastest_matmul(path.device)
    path = optimize(path, module, islice(inputs, 1), **how)
    with recorded() as recorder:
        started = now()
        optimize(path, module, inputs, steps=steps, **how)
        ms = 1e3 * (now() - started) / steps
    if trace is not None:
        recorder.export_chrome_trace(str(trace))
    on_gpu = path.device.type == "cuda"
    events = recorder.key_averages()
    phases = {}
    for name in PHASES:
        own = [e for e in events if e.key == f"fastgeo.{name}" and e.device_type == DeviceType.CPU]
        total = sum(e.device_time_total if on_gpu else e.cpu_time_total for e in own)
        phases[name] = total / steps / 1e3
    phases["other"] = max(ms - sum(phases.values()), 0)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    alone = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = [
        (e.key, getattr(e, alone) / steps / 1e3, e.count / steps)
        for e in events
        if e.device_type == kind and not e.key.startswith("fastgeo.")
    ]
    operations.sort(key=lambda operation: -operation[1])
    return Breakdown(ms, phases, operations[:10], _limit(operations, ms, floor, on_gpu))


def _limit(
    operations: list[tuple[str, float, float]], wall: float, floor: float, on_gpu: bool
) -> str:
    """What limits a step, in one sentence.

    Args:
        operations: (name, ms, calls) of a step.
        wall: ms of a step.
        floor: ms that its convolutions and matrix products would take at the rate of a large one.
    """
    busy = sum(ms for _, ms, _ in operations)
    matrix = sum(ms for name, ms, _ in operations if any(m in name.lower() for m in MATRIX))
    calls = sum(calls for _, _, calls in operations)
    if busy < 0.7 * wall:
        what = "the device waits" if on_gpu else "no operation runs"
        return (
            f"The host limits the step: {what} {1 - busy / wall:.0%} of the time, between "
            f"{calls:.0f} operations of {1e3 * busy / calls:.0f} µs on average; larger batches or "
            "more points in one pass use the machine better."
        )
    reach = f"which reach {floor / matrix:.0%} of a large matrix product's rate" if matrix else ""
    if matrix > 0.5 * busy:
        return (
            "Arithmetic limits the step: convolutions and matrix products are "
            f"{matrix / busy:.0%} of its time, {reach}."
        )
    return (
        "Memory traffic limits the step: norms, activations and copies are "
        f"{1 - matrix / busy:.0%} of its time, convolutions and matrix products {matrix / busy:.0%}"
        f"{', ' + reach if reach else ''}."
    )
