"""One dimension of a mesh of processes: the place on it, and what is sent along it."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import record_function

# Torch 2.14 renamed these two.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Message = tuple[int, Tensor]  # to or from a rank of the axis


class OtherRank(RuntimeError):
    """Another rank stopped; with its sentence."""


class LostRank(OtherRank):
    """Another rank is gone, without one."""


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """In which another rank is waited for, which may be lost."""
    try:
        with record_function("fastgeo.communication"):
            yield
    except RuntimeError as error:
        raise LostRank("the connection to another rank was lost") from error


class Kind(IntEnum):
    """What is sent, by which it is counted and tagged."""

    ends = 1  # logits of the two ends
    logits = 2  # of a block's first and last point
    sums = 3  # along the path, of the preconditioner
    points = 4  # weights and velocities, to another level
    neighbours = 5  # weights of the points beside a block
    gradients = 6
    weights = 7
    agreement = 8


class Axis:
    """The ranks of a mesh that differ from this one on one dimension.

    Attributes:
        rank, size: this one, and how many there are.
        sent: bytes that this rank sent, by their kind; of a collective, those of a ring's share.
    """

    def __init__(self, mesh: DeviceMesh, name: str, sent: Counter):
        self._group = mesh.get_group(name)
        self.rank, self.size = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.sent: Counter = sent

    def exchange(
        self, kind: Kind, sends: Iterable[Message], receives: Iterable[Message]
    ) -> list[dist.Work]:
        """Begin to send and to receive; what is sent must stay as it is until it was waited for."""
        messages = []
        for peer, tensor in sends:
            self.sent[kind.name] += tensor.nbytes
            messages.append(self._message(dist.isend, peer, tensor, kind))
        messages += [self._message(dist.irecv, peer, tensor, kind) for peer, tensor in receives]
        with connected():
            return dist.batch_isend_irecv(messages) if messages else []

    def reduced(self, parts: Tensor) -> Tensor:
        """[...], the sum of this rank's part over all ranks' parts [size, ...]."""
        own = parts.new_empty(parts.shape[1:])
        if own.numel():
            with connected():
                _reduce_scatter(own.view(-1), parts.view(-1), group=self._group)
            self._share(Kind.gradients, parts)
        return own

    def gathered(self, own: Tensor) -> Tensor:
        """[size, ...] of all ranks' own [...]."""
        parts = own.new_empty(self.size, *own.shape)
        if own.numel():
            with connected():
                _all_gather(parts.view(-1), own.contiguous().view(-1), group=self._group)
            self._share(Kind.weights, parts)
        return parts

    def add_up(self, values: Tensor) -> None:
        """Make the values their sum over all ranks."""
        if self.size > 1:
            with connected():
                dist.all_reduce(values, group=self._group)
            self._share(Kind.agreement, values, times=2)

    def objects(self, own: object) -> list:
        """Of all ranks, by their place."""
        found: list = [None] * self.size
        with connected():
            dist.all_gather_object(found, own, group=self._group)
        return found

    def _message(self, way: Callable, peer: int, tensor: Tensor, kind: Kind) -> dist.P2POp:
        return dist.P2POp(way, tensor, group=self._group, group_peer=peer, tag=kind)

    def _share(self, kind: Kind, whole: Tensor, times: int = 1) -> None:
        self.sent[kind.name] += times * whole.nbytes * (self.size - 1) // self.size


def wait(works: Iterable[dist.Work]) -> None:
    with connected():
        for work in works:
            work.wait()


def like(tensor: Tensor, number: float) -> Tensor:
    return torch.full_like(tensor, number, memory_format=torch.contiguous_format)
