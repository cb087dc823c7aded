"""Where the time of an optimisation step goes, and what limits it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import DeviceType

from fastgeo.data.inputs import Passes, on_device
from fastgeo.forward.options import Forward
from fastgeo.optimize import optimize
from fastgeo.path import Path
from fastgeo.profiling.compare import step_flops
from fastgeo.profiling.measure import (
    OtherLoad,
    matmul_rate,
    now,
    recorded,
    table,
    usable_cores,
)
from fastgeo.stacking.precision import matmul_precision
from fastgeo.step.descent import Descent
from fastgeo.step.phases import PHASES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COMMUNICATION = "communication"  # between ranks, within any of the phases
BUSY = 0.7  # of the time; below it there are gaps between operations
NEAR = 0.5  # of a large matrix product's rate: what limits that one limits this one, too
SHORT = 20  # µs; an operation on nothing takes some 5
OTHERS = 0.3  # cores; less is the system's own business
MATRIX = ("conv", "mm", "gemm", "cutlass", "xmma", "linear")  # in the names of operations


@dataclass(frozen=True)
class Breakdown:
    """What `breakdown` returns; all times are of one step.

    Attributes:
        ms: wall time.
        phases: name -> ms, on the device where there is one; "other" is what is left of a step.
        kernels: (operation, ms, calls) of the operations that take longest.
        limit: what limits the step, in one sentence.
        communication: of each rank of a mesh, the share of the step in which it sends, and waits
            for others; none in one process.
    """

    ms: float
    phases: dict[str, float]
    kernels: list[tuple[str, float, float]]
    limit: str
    communication: tuple[float, ...] = ()

    def __repr__(self) -> str:
        phases = [
            {"phase": name, "ms a step": ms, "share": f"{ms / self.ms:.0%}"}
            for name, ms in self.phases.items()
        ]
        kernels = [
            {"operation": name, "ms a step": ms, "share": f"{ms / self.ms:.0%}", "calls": calls}
            for name, ms, calls in self.kernels
        ]
        text = f"{table(phases)}\n\n{table(kernels)}\n\n{self.limit}"
        if self.communication:
            shares = ", ".join(f"{share:.0%}" for share in self.communication)
            text += f"\nRanks send and wait for others in {shares} of the step."
        return text


def breakdown(
    module: nn.Module,
    path: Path,
    batches: Iterable,
    *,
    descent: Descent,
    forward: Forward,
    steps: int = 5,
    trace: FilePath | None = None,
    mesh: "DeviceMesh | None" = None,
) -> Breakdown:
    """Where the time of a step goes; on a mesh, of the step of this rank.

    Args:
        module: the network of all points, in eval mode.
        path: where the first step starts.
        batches: as in `fastgeo.optimize`, at least steps + 2 of them.
        descent: how to descend, from all points at a constant rate.
        forward: how networks are evaluated, with an engine that is named but on a mesh.
        steps: how many are recorded, after two that are not.
        trace: write a trace for chrome://tracing or ui.perfetto.dev here, of the first rank.
        mesh: as in `fastgeo.optimize`.
    """
    inputs = Passes(batches, repeat=True)
    how: dict[str, Any] = dict(descent=descent, cuda_graph=False, mesh=mesh)
    flops = step_flops(module, path, on_device(next(inputs)[0], path.device))
    with matmul_precision(forward.precision):
        dtype = torch.bfloat16 if forward.precision == "bf16" else torch.float32
        floor = 1e3 * flops / matmul_rate(path.device, dtype)
    choices: list[dict] = []
    given = islice(inputs, 1)
    path = optimize(path, module, given, forward=forward, on_choice=choices.append, **how)
    if mesh is not None:
        from fastgeo.ranks.gather import gather

        path, floor = gather(path, mesh), floor / mesh.size()
        choices = [own[0] for own in _of_all_ranks(choices) if own]
        named = {k: choices[0][k] for k in ("engine", "channels_last", "chunk", "precision")}
        forward = replace(forward, **named, memory_budget=None)
    with recorded() as recorder:
        started, load = now(), OtherLoad()
        optimize(path, module, inputs, steps=steps, forward=forward, **how)
        ms, others = 1e3 * (now() - started) / steps, load.cores()
    if trace is not None and (mesh is None or not dist.get_rank()):
        recorder.export_chrome_trace(str(trace))
    on_gpu = path.device.type == "cuda"
    phases = _phases(recorder, on_gpu, steps)
    shares: list[float] = []
    if mesh is None:
        del phases[COMMUNICATION]
    else:
        shares = _of_all_ranks(phases[COMMUNICATION] / ms)
    phases["other"] = max(ms - sum(phases.values()), 0)
    events = recorder.key_averages()
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    alone = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    operations = [
        (e.key, getattr(e, alone) / steps / 1e3, e.count / steps)
        for e in events
        if e.device_type == kind and not e.key.startswith("fastgeo.")
    ]
    operations.sort(key=lambda operation: -operation[1])
    sentence = limit(
        operations,
        ms,
        floor,
        on_gpu=on_gpu,
        others=others,
        cores=len(usable_cores()),
        threads=torch.get_num_threads(),
    )
    return Breakdown(ms, phases, operations[:10], sentence, tuple(shares))


def _phases(recorder: Any, on_gpu: bool, steps: int) -> dict[str, float]:
    """Name -> ms of a step; those of communication are not in the phase that it is within."""
    spent = dict.fromkeys((*PHASES, COMMUNICATION), 0.0)
    for event in recorder.events():
        name = event.name.removeprefix("fastgeo.")
        if name == event.name or event.device_type != DeviceType.CPU:
            continue
        time = event.device_time_total if on_gpu else event.cpu_time_total
        spent[name] += time / steps / 1e3
        within = event.cpu_parent
        while name == COMMUNICATION and within is not None:
            if within.name.startswith("fastgeo."):
                spent[within.name.removeprefix("fastgeo.")] -= time / steps / 1e3
                break
            within = within.cpu_parent
    return spent


def _of_all_ranks(own: Any) -> list:
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def limit(
    operations: list[tuple[str, float, float]],
    wall: float,
    floor: float,
    *,
    on_gpu: bool,
    others: float = 0.0,
    cores: int = 1,
    threads: int = 1,
) -> str:
    """What limits a step, in one sentence.

    Args:
        operations: (name, ms, calls) of a step.
        wall: ms of a step.
        floor: ms that its convolutions and matrix products would take at the rate of a large one.
        on_gpu: operations are those of the device.
        others: cores that other processes kept busy meanwhile, of the `cores` that this one may use
            with so many `threads`.
    """
    busy = sum(ms for _, ms, _ in operations)
    calls = sum(calls for _, _, calls in operations)
    matrix = sum(ms for name, ms, _ in operations if any(m in name.lower() for m in MATRIX))
    share = f"convolutions and matrix products are {matrix / busy:.0%} of its time" if busy else ""
    if matrix:
        share += f" and reach {floor / matrix:.0%} of a large matrix product's rate"
    waits = busy < BUSY * wall
    if others >= OTHERS and others + threads > cores and (waits or not on_gpu):
        return (
            f"Other processes limit the step: they kept {others:.1f} of {cores} cores busy beside "
            f"its {threads} thread{'s' * (threads != 1)}; measure again without them, or set "
            "OMP_NUM_THREADS to what they leave."
        )
    if waits:
        what = "the device waits" if on_gpu else "no operation runs"
        return (
            f"The host limits the step: {what} {1 - busy / wall:.0%} of the time, between "
            f"{calls:.0f} operations of {1e3 * busy / max(calls, 1):.0f} µs on average; larger "
            "batches or more points in one pass use the machine better."
        )
    if matrix > 0.5 * busy and floor > NEAR * matrix:
        return f"Arithmetic limits the step: {share}."
    if 1e3 * busy < SHORT * calls:
        return (
            f"Overhead limits the step: {1e3 * busy / calls:.0f} µs is what its {calls:.0f} "
            f"operations take on average, little more than to start one; {share}."
        )
    return (
        f"Memory traffic limits the step: {share}, and norms, activations and copies are "
        f"{1 - matrix / busy:.0%}."
    )
