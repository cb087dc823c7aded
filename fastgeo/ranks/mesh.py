"""The mesh of processes that hold one path: points along one of its dimensions, and rows of the
batch along the other."""

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastgeo.ranks.agreement import Agreement, fingerprint
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
        return self.place == 0

    @property
    def place(self) -> int:
        """Of this rank among all."""
        return self.path.rank * self.data.size + self.data.rank

    @property
    def count(self) -> int:
        return self.path.size * self.data.size

    def in_turn(self, batches: Iterable) -> Iterator:
        """Those of this rank, of the same ones that all draw.

        Raises:
            ValueError: they have drawn others.
        """
        seen = 0
        for turn, batch in enumerate(batches):
            seen = (31 * seen + fingerprint(batch)) % 2**32
            if turn % self.count == self.place:
                yield batch
        self.agreement.same("what is evaluated", seen)

    def add_up(self, values: Tensor) -> None:
        """Make the values their sum over all ranks."""
        for axis in (self.path, self.data):
            axis.add_up(values)
