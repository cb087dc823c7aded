"""Processes that begin together, as ranks of a mesh, and do several things one after the other."""

import datetime
import os
import pickle
import time
import traceback
from pathlib import Path as FilePath
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

SECONDS = 120  # until a rank that waits gives up


class Raised(NamedTuple):
    """An error that a task raised."""

    kind: str
    text: str
    traceback: str


def results(tasks: dict, ranks: int, folder: FilePath) -> dict:
    """name -> what a task gave on each rank, in order: its result or `Raised`, and its seconds.

    Args:
        tasks: name -> (shape of the mesh, function of it and of arguments, arguments).
    """
    folder.mkdir()
    torch.multiprocessing.spawn(_rank, (ranks, folder, tasks), nprocs=ranks)
    every = [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(ranks)]
    return {name: [one[name] for one in every] for name in tasks}


def _rank(rank: int, ranks: int, folder: FilePath, tasks: dict) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    meshes: dict[tuple, DeviceMesh] = {}
    found = {}
    for name, (shape, function, arguments) in tasks.items():
        if shape not in meshes:
            meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=("path", "data"))
        dist.barrier()
        started = time.perf_counter()
        try:
            result = function(meshes[shape], *arguments)
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - it is what came of the task
            result = Raised(type(error).__name__, str(error), traceback.format_exc())
        found[name] = result, time.perf_counter() - started
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
