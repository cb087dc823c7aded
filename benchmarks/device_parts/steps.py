"""The optimisation step: how fast, of which kernels, and how true in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from fastgeo_kernels.stacked import conv_table
from torch import nn

from benchmarks import precompile, step_gpu
from benchmarks.device_parts import kernels, records
from benchmarks.device_parts.given import Given
from benchmarks.step_gpu import BOTH, COMPILED, GRAPHED, OURS, RELEASED
from fastgeo import models
from fastgeo.data.images import load
from fastgeo.path import Path
from fastgeo.profiling.measure import recorded

Row = dict[str, Any]
HALF_LOOP = "loop, bf16, channels-last"
KERNELS = 60  # of a replay, those that take the most time
STREAMS = 4  # over which convolutions that run one a network are spread
ENDS = 60  # steps in which an end is trained
RUNS = [("fp32", "fp32", 0), ("bf16", "bf16", 0), ("fp32, another order", "fp32", 1)]


def step(given: Given) -> Iterator[Row]:
    """Ours, with the table of convolutions as it is, as it was measured, and then over several
    streams; the loops; and a replay of ours, kernel by kernel."""
    start = step_gpu.Start.of(given.sizes.setting, given.device)
    known = records.read(given.folder / records.FILE)
    table = kernels.best_table(records.rows(known, "convolutions"))
    measure = partial(measured, given, start, engines=6)
    yield from measure([OURS])
    with kernels.applied(table):
        if table is not None:
            for row in measure([OURS]):
                yield row | {"how": "table as measured"}
        with mock.patch.object(conv_table, "STREAMS", STREAMS):
            for row in measure([OURS]):
                yield row | {"how": f"{STREAMS} streams"}
    yield from measure([RELEASED, HALF_LOOP, GRAPHED])
    with kernels.applied(table):
        yield from profiled(step_gpu.engines()[OURS].make(start.module, start.path, start.x))


def compiled(given: Given) -> Iterator[Row]:
    """The loop over compiled modules, as it is and from a CUDA graph."""
    precompile.leave()  # its compiler has processes and a cache of its own
    start = step_gpu.Start.of(given.sizes.setting, given.device)
    compiler = partial(torch.compile, backend=given.sizes.compiler)
    with mock.patch.object(torch, "compile", compiler):
        yield from measured(given, start, [COMPILED, BOTH], engines=2)


def measured(
    given: Given, start: step_gpu.Start, names: list[str], *, engines: int
) -> Iterator[Row]:
    """A row for each engine, with FLOP of a step.

    Args:
        engines: in the whole part, which share 40 % of its time for being timed; the rest is for
            making, compiling, capturing and checking them.
    """
    flop = given.sizes.setting.flop(start.module)
    how = dict(repeats=given.sizes.most, rounds=1, seconds=0.4 * given.seconds / engines)
    for one in step_gpu.measure(start, names, **how):
        yield asdict(one) | {"flop": flop}


def profiled(engine: Any) -> Iterator[Row]:
    """Kernels of one step (operations, on a CPU) by their time: how often, and us in all."""
    engine.step()
    with recorded() as recorder:
        engine.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on = "CUDA" if torch.cuda.is_available() else "CPU"
    took = "self_device_time_total" if on == "CUDA" else "self_cpu_time_total"
    events = [e for e in recorder.key_averages() if e.device_type.name == on]
    events.sort(key=lambda event: -getattr(event, took))
    for event in events[:KERNELS]:
        yield {"kernel": event.key, "calls": event.count, "us": getattr(event, took)}
    rest = sum(getattr(event, took) for event in events[KERNELS:])
    yield {"kernel": "all others", "calls": sum(e.count for e in events[KERNELS:]), "us": rest}


def precision(given: Given) -> Iterator[Row]:
    """Steps of the paper's descent between two networks that know the digits: in fp32, in bf16 on
    the same batches, and in fp32 on another order of them, which says what a difference means."""
    setting = given.sizes.setting
    data = load("digits").to(given.device)
    ends = [trained(setting, data, seed, given) for seed in (1, 2)]
    path = Path.linear(*ends, setting.points)
    points: dict[str, dict] = {}
    for name, how, seed in RUNS:
        batches = data.shuffled(setting.batch, torch.Generator().manual_seed(seed))
        x = [images for (images, _), _ in zip(batches, range(given.sizes.steps), strict=False)]
        engine = step_gpu.Fastgeo(ends[0], path, *x, precision=how, graphed=True)
        energies = list(engine.descend(given.sizes.steps))
        points[name] = engine.interior()
        yield {"run": name, "energies": energies, "from fp32": apart(points[name], points["fp32"])}
    yield {"run": "none", "energies": [], "from fp32": apart(path.interior, points["fp32"])}


def trained(setting: step_gpu.Setting, data: Any, seed: int, given: Given) -> nn.Module:
    """A network of the setting after some steps on the digits."""
    torch.manual_seed(seed)
    module = models.resnet(setting.depth, setting.width, in_channels=1).to(given.device)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    batches = data.shuffled(setting.batch, torch.Generator().manual_seed(seed))
    for (x, y), _ in zip(batches, range(ENDS), strict=False):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    return module.eval()


def apart(one: dict, other: dict) -> float:
    """Distance of two paths' points."""
    return sum((one[k] - other[k]).double().square().sum().item() for k in one) ** 0.5
