"""What all ranks of a mesh must be given alike."""

from collections.abc import Mapping
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from fastgeo.path import Path
from fastgeo.ranks.agreement import fingerprint
from fastgeo.ranks.mesh import Ranks


def alike(
    mesh: DeviceMesh, path: Path, settings: Mapping[str, Any], saves: bool, watched: bool
) -> tuple[Ranks, bool]:
    """The ranks, and whether one of them is watched, which takes all of them.

    Args:
        settings: of `fastgeo.optimize`, by name.
        saves: whether this rank was given checkpoints.
        watched: whether the path is to be known in every step.

    Raises:
        TypeError, ValueError: another mesh; something differs between the ranks, or cannot be done
            on a mesh.
    """
    ranks = Ranks(mesh)
    agreement = ranks.agreement
    if settings["cuda_graph"]:
        raise ValueError("cuda_graph=True is for one process; leave it out on a mesh")
    if settings["forward"].batchnorm == "recalibrate" and ranks.data.size > 1:
        raise ValueError(
            "a network that takes statistics of the batch needs the whole of it; give a mesh with "
            "one data rank"
        )
    for name, value in settings.items():
        agreement.same(name, value)
    agreement.same("whether there are checkpoints", saves)
    known = [path.kind, path.free, len(path), path.basis.size, sorted(path.start)]
    agreement.same("the path", [*known, fingerprint(path._parts())])
    return ranks, agreement.any(watched)
