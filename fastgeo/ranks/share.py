"""What one rank of a mesh holds of a path, and how that becomes a step of the whole.

Where the control points are the points that a step evaluates, a rank along the path holds a block
of them, and the update of a block takes two sums from the ranks beside it. Of a curve of few
control points every rank holds all of them and evaluates a block of the networks on it; their
gradients to the control points are added up.

Masters and momentum exist once: each rank that would hold the same has some columns of them, which
it updates and gives to the others.

Letters: M control points between the ends, K of them here, P parameters, S of them here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgeo.data.inputs import Inputs, tensors_of
from fastgeo.path import Path
from fastgeo.ranks.axis import Axis, Kind, Message, wait
from fastgeo.ranks.blocks import Block, Blocks
from fastgeo.ranks.boundary import Boundary
from fastgeo.ranks.mesh import Ranks
from fastgeo.ranks.sums import inverse_laplacian

Rows = Mapping[str, Tensor]  # name -> [K, ...]


@dataclass(frozen=True)
class Share:
    """The part of this rank in the steps of one level.

    Attributes:
        outline: a path like the whole, without its numbers: all control points are the start.
        networks: how many a step evaluates between the ends.
        split: whether a rank holds a block of the control points; else all of them.
    """

    ranks: Ranks
    outline: Path
    networks: int
    split: bool

    @classmethod
    def of(cls, ranks: Ranks, path: Path, nodes: int | None) -> "Share":
        """That of a path, or of its outline, with the nodes of a `fastgeo.Descent`."""
        split = path.free and nodes is None
        return cls(ranks, outline(path, path.basis.size), nodes or len(path) - 2, split)

    @cached_property
    def blocks(self) -> Blocks:
        """Of the networks that a step evaluates."""
        return Blocks.deal(self.networks, self.ranks.path.size)

    @cached_property
    def points(self) -> Blocks:
        """Of the points of the path."""
        return Blocks.deal(len(self.outline) - 2, self.ranks.path.size)

    @property
    def block(self) -> Block:
        """The networks that this rank evaluates."""
        return self.blocks.of[self.ranks.path.rank]

    @property
    def held(self) -> Block:
        """The control points that this rank holds, of those between the ends."""
        return self.block if self.split else Block(0, self.outline.basis.size - 2)

    @property
    def ends(self) -> list[int]:
        """Those that this rank evaluates: 0 for the start, 1 for the end."""
        return [end for end in (0, 1) if self.blocks.ends[end] == self.ranks.path.rank]

    # --- Points -----------------------------------------------------------------------------------

    def part(self, whole: Path) -> Path:
        """What this rank holds of a path, between the ends of the whole, on its device."""
        first, last = self.held
        held = {name: tensor[first:last].clone() for name, tensor in whole.interior.items()}
        return whole.with_interior(held).to(self.ranks.device)

    def section(self, part: Path) -> Path:
        """The points of this rank, with those beside them as ends; without a point, two ends."""
        block = self.points.of[self.ranks.path.rank]
        if not block.size:
            none = {name: tensor[:0] for name, tensor in part.interior.items()}
            return Path(part.start, none, part.end, part.interpolated)
        if self.split:
            return self._with_neighbours(part)
        t = torch.arange(block.first, block.last + 2, dtype=torch.float64) / (len(part) - 1)
        points = part.mixed(part.basis.weights(t))
        start, end = (part.start | {n: p[at] for n, p in points.items()} for at in (0, -1))
        return Path(start, {n: p[1:-1] for n, p in points.items()}, end, part.interpolated)

    def length(self, section: Path) -> float:
        """Of the edges that this rank counts: those to the left of its points, and the last one."""
        holding = self.points.holding
        if self.ranks.data.rank or self.ranks.path.rank not in holding:
            return 0.0
        edges = section.euclidean()
        last = self.ranks.path.rank == holding[-1]
        return (edges if last else edges[:-1]).sum().item()

    def resized(self, size: int) -> "Share":
        """That of the same curve with so many control points."""
        like = outline(self.outline, size)
        return replace(self, outline=like, networks=size - 2 if self.split else self.networks)

    def moved(self, rows: Rows, ends: Sequence[Rows], to: "Share") -> dict[str, Tensor]:
        """What this rank is to hold of a curve, of what the ranks hold of it now."""
        if not self.split:
            start, end = ends
            free = self.outline.free
            points = None if free else len(self.outline)
            curve = Path(start, rows, end, kind=self.outline.kind, points=points)
            return curve.refined(to.outline.basis.size).interior
        me, packed = self.ranks.path.rank, _Packed(rows)
        known: dict[int, Rows] = {}
        incoming, sends, receives = [], [], []
        for rank in range(self.ranks.path.size):
            given, wanted = self._needed(me, rank, to), self._needed(rank, me, to)
            if rank == me:
                known |= {p: packed.row(p - 1 - self.block.first) for p in given}
                continue
            if given:
                sends += [(rank, t) for t in packed.rows([p - 1 - self.block.first for p in given])]
            if wanted:
                got = packed.room(len(wanted))
                incoming.append((wanted, got))
                receives += [(rank, t) for t in got]
        wait(self.ranks.path.exchange(Kind.points, sends, receives))
        for wanted, got in incoming:
            opened = packed.opened(got)
            known |= {p: {n: t[i] for n, t in opened.items()} for i, p in enumerate(wanted)}
        known |= {0: ends[0], self.networks + 1: ends[1]}
        low, weight = self._between(to, me)
        moved = {}
        for name, tensor in rows.items():
            if not low:
                moved[name] = tensor[:0]
                continue
            below, above = (torch.stack([known[p + i][name] for p in low]) for i in (0, 1))
            upper = weight.to(below).view(-1, *[1] * (below.ndim - 1))
            moved[name] = torch.lerp(below, above, upper)
        return moved

    # --- Steps ------------------------------------------------------------------------------------

    def own_rows(self, inputs: Inputs) -> tuple[slice, int]:
        """Which of the rows of a batch are this data rank's, and how many there are."""
        count = max((len(t) for t in tensors_of(inputs) if t.ndim), default=1)
        size, rank = self.ranks.data.size, self.ranks.data.rank
        firsts = [r * (count // size) + min(r, count % size) for r in (rank, rank + 1)]
        return slice(*firsts), count

    def boundary(self, ends: dict[int, Tensor], ready: Callable[[], None]) -> Boundary:
        """Of one step. As of `Boundary`."""
        return Boundary(self.blocks, self.ranks.path, ends, ready)

    def terms(self, own: Tensor, count: int) -> Tensor:
        """[count] float64, of all edges or networks, with this rank's own where they are.

        Args:
            own: [K + 1] of the edges beside this rank's networks, or [K] of those.
        """
        whole = torch.zeros(count, dtype=torch.float64)
        if self.block.size:
            edges = count > self.networks
            last = self.ranks.path.rank == self.blocks.holding[-1]
            own = own if last or not edges else own[: self.block.size]
            whole[self.block.first : self.block.first + len(own)] = own.double().cpu()
        return whole

    # --- Columns ----------------------------------------------------------------------------------

    @cached_property
    def sharing(self) -> list[Axis]:
        """The axes along which ranks hold the same rows, of which each has some columns."""
        axes = [self.ranks.data] if self.split else [self.ranks.data, self.ranks.path]
        return [axis for axis in axes if axis.size > 1]

    def span(self, columns: int) -> tuple[int, int]:
        """The first of this rank's columns, of so many, and the one behind the last."""
        low, high, width = 0, columns, columns
        for axis in self.sharing:
            width = -(-width // axis.size)
            low += axis.rank * width
            high = min(high, low + width)
        return min(low, high), high

    def columns(self, rows: Tensor) -> Tensor:
        """This rank's [K, S] of [K, P], filled up with zeros."""
        for axis in self.sharing:
            rows = _parts(rows, axis.size)[axis.rank]
        return rows

    def direction(self, gradient: Tensor, *, precondition: bool, mean: bool) -> Tensor:
        """This rank's columns [K, S] of the step along a gradient [K, P] to the control points.

        Args:
            gradient: of this rank's part of the batch, and of its networks.
            precondition: as of `fastgeo.Descent`.
            mean: whether the objective is a mean over the networks, and no sum over edges.
        """
        for axis in self.sharing:
            gradient = axis.reduced(_parts(gradient, axis.size))
        if not (self.split and precondition and len(gradient)):
            return gradient
        step = inverse_laplacian(gradient, self.blocks, self.ranks.path)
        return step.div_(self.networks + 1) if mean else step

    def whole_rows(self, own: Tensor, columns: int) -> Tensor:
        """[K, P] of all ranks' columns [K, S]."""
        widths = [columns]
        for axis in self.sharing:
            widths.append(-(-widths[-1] // axis.size))
        for axis, width in zip(reversed(self.sharing), reversed(widths[:-1]), strict=True):
            own = axis.gathered(own).transpose(0, 1).flatten(1)[:, :width]
        return own

    # --- Levels -----------------------------------------------------------------------------------

    def _between(self, to: "Share", rank: int) -> tuple[list[int], Tensor]:
        """Between which of the control points a rank's lie in another number: the lower of two for
        each, counted with the start, and the weight of the upper one."""
        first, last = to.blocks.of[rank]
        edges, others = self.networks + 1, to.networks + 1
        places = torch.arange(first + 1, last + 1, dtype=torch.float64) * edges / others
        low = places.floor().long().clamp(max=edges - 1)
        return low.tolist(), places - low

    def _needed(self, owner: int, user: int, to: "Share") -> list[int]:
        """The points that one rank holds and another needs, counted with the start."""
        low, _ = self._between(to, user)
        first, last = self.blocks.of[owner]
        return [p for p in range(first + 1, last + 1) if p in low or p - 1 in low]

    def _with_neighbours(self, part: Path) -> Path:
        packed, rank = _Packed(part.interior), self.ranks.path.rank
        sends: list[Message] = []
        receives: list[Message] = []
        ends = [part.start, part.end]
        got = {}
        rows = zip(self.blocks.beside(rank), (0, self.block.size - 1), strict=True)
        for side, (peer, row) in enumerate(rows):
            if peer is not None:
                got[side] = packed.room(1)
                sends += [(peer, tensor) for tensor in packed.rows([row])]
                receives += [(peer, tensor) for tensor in got[side]]
        wait(self.ranks.path.exchange(Kind.neighbours, sends, receives))
        for side, tensors in got.items():
            ends[side] = ends[side] | {n: t[0] for n, t in packed.opened(tensors).items()}
        return Path(ends[0], part.interior, ends[1], part.interpolated)


def outline(path: Path, size: int) -> Path:
    """A path of its kind with so many control points, all of which are the start, in its memory."""
    return path.with_interior(
        {name: path.start[name].expand(size - 2, *path.start[name].shape) for name in path.interior}
    )


class _Packed:
    """Rows of named tensors [K, ...] as few tensors [count, P], one of each type of numbers."""

    def __init__(self, named: Rows):
        self._named = named
        self._names: dict[torch.dtype, list[str]] = {}
        for name, tensor in named.items():
            self._names.setdefault(tensor.dtype, []).append(name)

    def row(self, i: int) -> dict[str, Tensor]:
        return {name: tensor[i] for name, tensor in self._named.items()}

    def rows(self, which: list[int]) -> list[Tensor]:
        return [
            torch.cat([self._named[name][which].reshape(len(which), -1) for name in names], 1)
            for names in self._names.values()
        ]

    def room(self, count: int) -> list[Tensor]:
        return [
            self._named[names[0]].new_empty(count, sum(self._size(name) for name in names))
            for names in self._names.values()
        ]

    def opened(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        """name -> [count, ...]."""
        found = {}
        for names, whole in zip(self._names.values(), packed, strict=True):
            parts = whole.split([self._size(name) for name in names], 1)
            for name, part in zip(names, parts, strict=True):
                found[name] = part.view(len(whole), *self._named[name].shape[1:])
        return {name: found[name] for name in self._named}

    def _size(self, name: str) -> int:
        return self._named[name].shape[1:].numel()


def _parts(rows: Tensor, count: int) -> Tensor:
    """[count, K, S] of rows [K, P], filled up with zeros."""
    padded = F.pad(rows, (0, -rows.shape[1] % count))
    return padded.unflatten(1, (count, -1)).transpose(0, 1).contiguous()
