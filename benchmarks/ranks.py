"""A step on a mesh of processes: bytes against formulas, time against one process, and a model.

    python -m benchmarks.ranks                       # meshes of 2 and 4 processes on this machine
    python -m benchmarks.ranks --meshes 8x1 4x2      # of others

Each process has one thread. Where there are fewer cores than processes the time of a step says
little; the slowest rank's own time on a processor beside that of one process says what is shared.

The model is arithmetic, not measurement: what a step would take on GPUs whose speeds are assumed.
"""

import pickle
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.distributed as dist
import tyro
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.harness import environment, printed, write_result
from fastgeo import Descent, Forward, Path, models, optimize
from fastgeo.profiling.measure import headline
from fastgeo.ranks import alike
from fastgeo.ranks.blocks import END, POINT, Blocks
from fastgeo.step.memory import point_bytes

WARM_UP = 3  # steps
KINDS = ("logits", "ends", "sums", "gradients", "weights", "agreement")


@dataclass(frozen=True)
class Options:
    """A step on meshes of processes."""

    meshes: tuple[str, ...] = ("2x1", "1x2", "4x1", "2x2")
    """path x data ranks"""
    points: int = 25
    """N"""
    batch: int = 128
    """images in a step"""
    steps: int = 20
    """of which the median is taken"""
    save: bool = False
    """write benchmarks/results/ranks-cpu.json"""


@dataclass(frozen=True)
class Setting:
    """Of the model.

    Attributes:
        flop: of one network's forward pass on one input.
        parameters, classes, points, batch: P, C, N, B.
    """

    name: str
    flop: float
    parameters: float
    classes: int
    points: int
    batch: int
    meshes: tuple[tuple[int, int], ...]


SETTINGS = (
    Setting("paper", 1.3e9, 4.33e6, 10, 25, 256, ((8, 1), (4, 2), (2, 4), (1, 8))),
    Setting("ViT-B/16, ImageNet", 35e9, 86.6e6, 1000, 129, 1024, ((64, 1), (8, 8), (1, 64))),
    Setting("7B, 8,192 tokens", 14e9, 7e9, 32000, 17, 8192, ((15, 2), (32, 1), (1, 32))),
)
SPEED = 300e12  # FLOP/s that a GPU sustains, assumed
WITHIN, BETWEEN, NODE = 350e9, 45e9, 8  # bytes/s of a GPU within a node and beyond it, assumed
CARD = 80e9  # bytes of a GPU


def formulas(blocks: Blocks, data: int, batch: int, classes: int, parameters: int) -> list[dict]:
    """Bytes that each rank along the path sends in a step in fp32, by their kind."""
    row, found = 4 * -(-batch // data) * classes, []
    users = blocks.holding[0], blocks.holding[-1]
    for rank, block in enumerate(blocks.of):
        beside = sum(peer is not None for peer in blocks.beside(rank)) if block.size else 0
        away = sum(r == rank != user for r, user in zip(blocks.ends, users, strict=True))
        held = 4 * block.size * data * -(-parameters // data)
        shared = held * (data - 1) // data
        sums = 4 * -(-parameters // data) * beside
        kinds = dict(logits=row * beside, ends=row * away, sums=sums)
        found.append(kinds | dict(gradients=shared, weights=shared))
    return found


def measured(shape: tuple[int, int], options: Options) -> dict[str, Any]:
    """One mesh: bytes of the busiest rank, and medians of a step."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        given = shape, options, FilePath(folder)
        torch.multiprocessing.spawn(_rank, given, nprocs=shape[0] * shape[1])
        files = sorted(FilePath(folder).glob("*.pickle"))
        every = [pickle.loads(file.read_bytes()) for file in files]
    return dict(
        wall=max(one["wall"] for one in every),
        processor=max(one["processor"] for one in every),
        sent={kind: max(one["sent"].get(kind, 0) for one in every) for kind in KINDS},
    )


def _rank(rank: int, shape: tuple[int, int], options: Options, folder: FilePath) -> None:
    torch.set_num_threads(1)
    ranks = shape[0] * shape[1]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=ranks
    )
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("path", "data"))
    found = steps(options, mesh)
    (folder / f"{rank:03d}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def steps(options: Options, mesh: Any = None) -> dict[str, Any]:
    """Medians of a step in this process, in seconds, and what it sent in one."""
    made, ranks = [], alike.Ranks
    alike.Ranks = lambda mesh: made.append(ranks(mesh)) or made[-1]  # type: ignore[assignment]
    seen: list[tuple[float, float, dict]] = []
    x = torch.randn(options.batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def batches() -> Iterator[Tensor]:
        while True:
            sent = dict(made[0].sent) if made else {}
            seen.append((time.perf_counter(), time.thread_time(), sent))
            yield x

    def network(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return models.resnet(8, 0.5, in_channels=1)

    path = Path.linear(network(1), network(2), options.points)
    how = Descent(coarse_to_fine=False)
    count = WARM_UP + options.steps + 1
    forward = Forward(engine="stacked")
    try:
        optimize(path, network(0), batches(), steps=count, descent=how, forward=forward, mesh=mesh)
    finally:
        alike.Ranks = ranks  # type: ignore[misc]
    seen = seen[WARM_UP:]
    pairs = list(zip(seen, seen[1:], strict=False))
    (_, _, before), (_, _, after) = seen[0], seen[-1]
    return dict(
        wall=statistics.median(b[0] - a[0] for a, b in pairs),
        processor=statistics.median(b[1] - a[1] for a, b in pairs),
        sent={kind: (after[kind] - before[kind]) // len(pairs) for kind in after},
    )


def rows(options: Options) -> Iterator[list[dict[str, Any]]]:
    """A row for one process, and one for each mesh."""
    torch.set_num_threads(1)
    alone = steps(options)
    yield [dict(mesh="one process") | _times(alone, alone) | {"bytes sent": "", "by formula": ""}]
    parameters = sum(p.numel() for p in models.resnet(8, 0.5, in_channels=1).parameters())
    for name in options.meshes:
        shape = tuple(map(int, name.split("x")))
        found = measured((shape[0], shape[1]), options)
        blocks = Blocks.deal(options.points - 2, shape[0])
        expected = formulas(blocks, shape[1], options.batch, 10, parameters)
        most = {kind: max(one[kind] for one in expected) for kind in expected[0]}
        sent = {kind: found["sent"][kind] for kind in most}
        yield [
            dict(mesh=name)
            | _times(found, alone)
            | {
                "bytes sent": _listed(sent),
                "by formula": "the same" if sent == most else _listed(most),
            }
        ]


def _times(found: dict[str, Any], alone: dict[str, Any]) -> dict[str, Any]:
    ideal = f"{alone['processor'] / found['processor']:.2f}"
    return {
        "ms": round(1e3 * found["wall"], 1),
        "ms on a processor": round(1e3 * found["processor"], 1),
        "of one process": ideal,
    }


def _listed(sent: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count:,}" for kind, count in sent.items() if count)


def modelled(setting: Setting) -> list[dict[str, Any]]:
    """A row for each mesh: the least time of a step, without any overlap of computing and sending,
    and what a GPU holds."""
    found = []
    whole = POINT * (setting.points - 2) + 2 * END
    for path, data in setting.meshes:
        blocks = Blocks.deal(setting.points - 2, path)
        sizes = [block.size for block in blocks.of]
        load = max(POINT * size + END * blocks.ends.count(r) for r, size in enumerate(sizes))
        compute = load * setting.flop * setting.batch / data / SPEED
        ideal = whole * setting.flop * setting.batch / SPEED / (path * data)
        given = blocks, data, setting.batch, setting.classes, int(setting.parameters)
        sent = [sum(kinds.values()) for kinds in formulas(*given)]
        along = [sum(kinds[k] for k in ("logits", "ends", "sums")) for kinds in formulas(*given)]
        # Data ranks lie side by side in nodes, ranks along the path beyond them.
        across = WITHIN if path * data <= NODE else BETWEEN
        beside = WITHIN if data <= NODE else BETWEEN
        sending = max(a / across + (s - a) / beside for a, s in zip(along, sent, strict=True))
        point = point_bytes(int(setting.parameters), momentum=True, ranks=data)
        held = max(sizes) * sum(point.values())
        found.append(
            {
                "setting": setting.name,
                "GPUs": path * data,
                "mesh": f"{path}x{data}",
                "computing ms": round(1e3 * compute, 2),
                "sending ms": round(1e3 * sending, 2),
                "efficiency": round(ideal / (compute + sending), 2),
                "GB a GPU, without activations": round(held / 1e9, 1),
                "fits 80 GB": "yes" if held < CARD else "no",
            }
        )
    return found


def main(options: Options) -> None:
    print(headline(environment()))
    print(f"\nResNet8, {options.points} points, {options.batch} images, fp32, one thread a process")
    table = printed(rows(options))
    print("\nA model, not a measurement: nothing sent while computing, speeds assumed")
    model = printed([modelled(setting) for setting in SETTINGS])
    if options.save:
        print(f"\nwritten: {write_result('ranks-cpu', dict(rows=table, model=model))}")


if __name__ == "__main__":
    main(tyro.cli(Options))
