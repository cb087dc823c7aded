"""The mesh of processes that hold one path: points along one of its dimensions, and rows of the
batch along the other."""

from collections import Counter

import torch
from torch.distributed.device_mesh import DeviceMesh

from fastgeo.ranks.agreement import Agreement
from fastgeo.ranks.axis import Axis

NAMES = ("path", "data")


class Ranks:
    """The place of this process on a mesh.

    Args:
        mesh: of dimensions ("path", "data").

    Attributes:
        path, data: its dimensions.
        device: where this rank computes.
        agreement: between all of them.
        sent: bytes that this rank has sent, by their kind.

    Raises:
        TypeError, ValueError: another mesh.
    """

    def __init__(self, mesh: DeviceMesh):
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                "mesh must be a torch.distributed DeviceMesh of dimensions ('path', 'data'), got "
                f"{type(mesh).__name__}"
            )
        if mesh.mesh_dim_names is None or set(mesh.mesh_dim_names) != set(NAMES):
            raise ValueError(
                f"mesh must have the dimensions ('path', 'data'), got {mesh.mesh_dim_names}"
            )
        if mesh.get_coordinate() is None:
            raise ValueError("this process is not on the mesh")
        self.sent: Counter = Counter()
        self.path, self.data = (Axis(mesh, name, self.sent) for name in NAMES)
        self.device = torch.device(mesh.device_type)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.agreement = Agreement([self.path, self.data], self.device)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.path.rank == 0 and self.data.rank == 0
