"""A whole path of the sections that the ranks of a mesh have."""

from collections import Counter

import torch
from torch.distributed.device_mesh import DeviceMesh

from fastgeo.path import Path
from fastgeo.ranks.axis import Axis


def gather(section: Path, mesh: DeviceMesh) -> Path:
    """The whole path, on every rank, of the sections that `fastgeo.optimize` returned on a mesh.

    A curve of few control points is no section, and returned as it is.

    Example:
        >>> path = gather(optimize(path, module, batches, steps=100, mesh=mesh), mesh)
        >>> if torch.distributed.get_rank() == 0:
        ...     path.save("path.safetensors")
    """
    if not section.free:
        return section
    axis = Axis(mesh, "path", Counter())
    sizes = axis.objects(len(section) - 2)
    holding = [rank for rank, size in enumerate(sizes) if size]
    first, last = holding[0], holding[-1]
    start, interior, end = dict(section.start), {}, dict(section.end)
    for name, own in section.controls.items():  # [K + 2, ...]
        room = own.new_zeros(max(sizes) + 2, *own.shape[1:])
        room[: len(own)] = own
        every = axis.gathered(room)
        start[name], end[name] = every[first, 0].clone(), every[last, sizes[last] + 1].clone()
        interior[name] = torch.cat([every[rank, 1 : sizes[rank] + 1] for rank in holding])
    path = Path(start, interior, end, section.interpolated)
    path.history = section.history
    return path
