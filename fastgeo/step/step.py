"""A step of descent on a path, on memory that never moves: objective, gradient, update."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from fastgeo_kernels import path_update
from torch import Tensor, nn

from fastgeo.data.inputs import Inputs
from fastgeo.path import Path
from fastgeo.step.descent import Descent
from fastgeo.step.energy import Beside, energy_and_gradient, losses_and_gradient
from fastgeo.step.engines import Engine
from fastgeo.step.logits import Logits
from fastgeo.step.nodes import Grid
from fastgeo.step.phases import phase

if TYPE_CHECKING:  # what one process needs not
    from fastgeo.ranks.share import Share

ALIGNED = 16  # numbers: how far apart parameters begin on a GPU, which then loads several at a time


class Batch(NamedTuple):
    """What a step is taken on.

    Attributes:
        inputs: on the device of the path.
        counted: [B, ...], which of the rows count; None for all.
        labels: [B, ...], None where the objective needs none.
        share: of the rows that count in the whole batch, how many are in this.
    """

    inputs: Inputs
    counted: Tensor | None
    labels: Tensor | None = None
    share: float = 1.0


@dataclass
class _Block:
    """Parameters whose weights lie side by side, in one tensor [M, P] of the M control points
    between the ends.

    Attributes:
        weight: what networks are evaluated with.
        master: what is updated; the weights themselves, or some columns of them [M, S].
        velocity: of the master.
        copy: the weights in bf16, for layers that read them so.
        ends: [2, P], as the weights, if their distances are asked for.
    """

    names: list[str]
    weight: Tensor
    master: Tensor
    velocity: Tensor | None
    copy: Tensor | None = None
    ends: Tensor | None = None


class Step:
    """The control points of a path, in memory that every step changes in place.

    On a GPU all parameters of a dtype lie side by side, so that the update is one kernel, each of
    them filled up with zeros to a multiple of `ALIGNED` columns; on a CPU each lies by itself, as
    convolutions want it. What several processes share lies side by side without any filling.

    Args:
        path: where to start; not changed.
        module: says which parameters are trained, and which of them are one.
        descent: how to descend.
        velocity: first name of each parameter -> [M, ...] of the momentum; none yet if empty.
        channels_last: weights of images with their channels innermost.
        share: what this process has of a path that several hold, of which `path` and velocity are
            the control points that it holds.

    Attributes:
        path: as it is now; its tensors change with every step.
        evaluated: the networks that the engine is given, as a path of free points.
        trained: name of every parameter to train -> the first name of it.
    """

    def __init__(
        self,
        path: Path,
        module: nn.Module,
        descent: Descent,
        velocity: Mapping[str, Tensor] | None = None,
        *,
        channels_last: bool = False,
        share: "Share | None" = None,
    ):
        self.descent, self.channels_last, self._share = descent, channels_last, share
        self.trained = trained_names(module)
        self._shapes = {name: path.interior[name].shape for name in self.trained.values()}
        self._aligned = ALIGNED if _on_gpu(path) and share is None else 1
        self._blocks = []
        for names in self._side_by_side(path):
            weight = self._rows([path.interior[name] for name in names]).clone()
            master = self._columns(weight)
            moving = torch.zeros_like(master) if descent.momentum else None
            if moving is not None and velocity:
                moving.copy_(self._columns(self._rows([velocity[name] for name in names])))
            self._blocks.append(_Block(names, weight, master, moving))
        self._origin = path
        self._half: set[str] = set()
        self._grid: Grid | None = None
        self._constant: Tensor | float = 0.0
        self.path = self._origin = self._path_of(self._views())  # and the one given can go
        self.evaluated = self.path

    def keep_half(self, names: Iterable[str]) -> None:
        """From now on these parameters are read from a bf16 copy, which the update makes."""
        self._half = names = set(names)
        if self._grid is not None:
            return self.place(self._grid)
        halves: dict[str, Tensor] = {}
        for block in self._blocks:
            if names.intersection(block.names):
                block.copy = block.weight.bfloat16()
                halves |= self._split(block, block.copy)
        own = self._views() | {n: t for n, t in halves.items() if n in names}
        self.evaluated = self._path_of(own)

    def measure(self) -> bool:
        """From now on an update says how long the path was; no: it cannot, since its networks are
        not the control points, or parameters are tied, which count under every name."""
        path = self.path
        if not path.free or len(self._shapes) < len(self.trained):
            return False
        for block in self._blocks:
            pairs = [torch.stack([path.start[name], path.end[name]]) for name in block.names]
            block.ends = self._rows(pairs)
        others = {name: t for name, t in path.interior.items() if name not in self.trained}
        self._constant = path.with_interior(others).euclidean().square() if others else 0.0
        return True

    def place(self, grid: Grid | None) -> None:
        """From now on the networks are those of the curve on this grid; None: control points."""
        if grid is None:
            return
        self._grid, path = grid, self.path
        points = path.mixed(grid.weights)
        half = {name: points[name].bfloat16() for name in self._half}
        self.evaluated = Path(path.start, points | half, path.end, path.interpolated)

    def gradient(
        self, engine: Engine, batch: Batch, beside: Logits | Beside
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `energy_and_gradient`."""
        given = self.evaluated, engine, batch.inputs, self.trained
        counts = None if self._grid is None else self._grid.counts
        return energy_and_gradient(*given, beside, batch.counted, counts, batch.share)

    def loss_gradient(
        self, engine: Engine, batch: Batch, *, check: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As of `losses_and_gradient`."""
        assert batch.labels is not None
        given = self.evaluated, engine, batch.inputs, self.trained
        scale = batch.share
        if self._share is not None:  # the mean is that of all networks
            scale *= self._share.block.size / self._share.networks
        return losses_and_gradient(*given, batch.labels, batch.counted, check=check, scale=scale)

    def no_gradient(self) -> dict[str, Tensor]:
        """Zeros, of networks that are not evaluated."""
        own = self.evaluated.interior
        return {name: torch.zeros_like(own[name]) for name in self._shapes}

    def update(self, gradient: Mapping[str, Tensor], rate: float | Tensor) -> Tensor | None:
        """Move the control points along a gradient to the networks, first name -> [T, ...].

        Returns:
            What `Path.euclidean` gave before, if that is measured.
        """
        how, share = self.descent, self._share
        squares = self._constant
        with phase("update"):
            for block in self._blocks:
                rows = self._back(self._rows([gradient[name] for name in block.names]))
                precondition = how.precondition and self._grid is None
                if share is not None:
                    mean = how.objective != "jsd"
                    rows = share.direction(rows, precondition=precondition, mean=mean)
                if block.master.numel():
                    apart = path_update(
                        block.master,
                        rows,
                        rate,
                        precondition=precondition and share is None,
                        momentum=how.momentum,
                        nesterov=how.momentum > 0,
                        velocity=block.velocity,
                        copy=block.copy,
                        ends=block.ends,
                    )
                    squares = squares if apart is None else squares + apart
                if share is not None and block.master is not block.weight:
                    block.weight.copy_(share.whole_rows(block.master, block.weight.shape[1]))
        return squares.sqrt() if isinstance(squares, Tensor) else None

    def velocity(self) -> dict[str, Tensor]:
        """A copy of the momentum's, first name -> [M, ...]; empty without momentum."""
        views: dict[str, Tensor] = {}
        for block in self._blocks:
            whole = block.velocity
            if whole is None:
                continue
            if self._share is not None:
                whole = self._share.whole_rows(whole, block.weight.shape[1])
            views |= self._split(block, whole)
        return {name: _copied(view) for name, view in views.items()}

    def columns(self) -> list[tuple[list[str], tuple[int, int], dict[str, Tensor]]]:
        """A copy of what this process has of the weights and the momentum of parameters that lie
        side by side: their names, the first column and the one behind the last, [M, S] of each."""
        found = []
        for block in self._blocks:
            first, last = 0, block.weight.shape[1]
            if self._share is not None:
                first, last = self._share.span(last)
            own = {"weight": block.master, "velocity": block.velocity}
            parts = {k: _copied(t[:, : last - first]) for k, t in own.items() if t is not None}
            found.append((block.names, (first, last), parts))
        return found

    def copied_path(self) -> Path:
        """The path as it is now, in memory of its own."""
        own = {name: _copied(view) for name, view in self._views().items()}
        return self._path_of(own)

    def memory(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [t for b in self._blocks for t in (b.weight, b.velocity, b.copy) if t is not None]

    def _path_of(self, trained: Mapping[str, Tensor]) -> Path:
        own = {name: trained[first] for name, first in self.trained.items()}
        return self._origin.with_interior(self._origin.interior | own)

    def _back(self, rows: Tensor) -> Tensor:
        """[M, P] of a gradient to the networks [T, P], preconditioned if the grid says so."""
        if self._grid is None:
            return rows
        precise = torch.promote_types(rows.dtype, torch.float32)
        return self._grid.back.to(rows.device, precise) @ rows.to(precise)

    def _columns(self, rows: Tensor) -> Tensor:
        """Those of rows [M, P] that this process updates, in memory of its own; rows if all."""
        if self._share is None or not self._share.sharing:
            return rows
        return self._share.columns(rows).clone()

    def _side_by_side(self, path: Path) -> list[list[str]]:
        if not _on_gpu(path) and self._share is None:
            return [[name] for name in self._shapes]
        dtypes: dict[torch.dtype, list[str]] = {}
        for name in self._shapes:
            dtypes.setdefault(path.interior[name].dtype, []).append(name)
        return list(dtypes.values())

    def _views(self) -> dict[str, Tensor]:
        """First name -> [M, ...] of the weights in their place in the blocks."""
        parts = (self._split(block, block.weight) for block in self._blocks)
        return {name: view for part in parts for name, view in part.items()}

    def _split(self, block: _Block, flat: Tensor) -> dict[str, Tensor]:
        sizes = [self._shapes[name][1:].numel() for name in block.names]
        widths = [size + self._filling(size) for size in sizes]
        views = {}
        for name, size, whole in zip(block.names, sizes, flat.split(widths, 1), strict=True):
            shape, part = self._shapes[name], whole[:, :size]
            if self._innermost(shape):
                points, out, channels, *kernel = shape
                views[name] = part.view(points, out, *kernel, channels).movedim(-1, 2)
            else:
                views[name] = part.view(shape)
        return views

    def _rows(self, tensors: list[Tensor]) -> Tensor:
        """[M, P] of tensors [M, ...], as they lie in a block."""
        rows = []
        for tensor in tensors:
            own = tensor.movedim(2, -1) if self._innermost(tensor.shape) else tensor
            size = tensor.shape[1:].numel()
            rows.append(own.reshape(len(own), size))
            if filling := self._filling(size):
                rows.append(own.new_zeros(len(own), filling))
        return (torch.cat(rows, 1) if len(rows) > 1 else rows[0]).contiguous()

    def _filling(self, size: int) -> int:
        """How many zeros lie behind so many numbers of a parameter."""
        return -size % self._aligned

    def _innermost(self, shape: torch.Size) -> bool:
        return self.channels_last and len(shape) == 5


def _on_gpu(path: Path) -> bool:
    return path.device.type != "cpu"


def trained_names(module: nn.Module) -> dict[str, str]:
    """Name of every parameter to train -> the first name of it (tied parameters have several)."""
    first: dict[nn.Parameter, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    trained = {name: first.setdefault(p, name) for name, p in names if p.requires_grad}
    if not trained:
        raise ValueError("the module has no parameter with requires_grad to train")
    return trained


def resampled(velocity: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The velocity [M, ...] of other control points as that of a path's, which is finer or coarser:
    a curve, too, that is 0 at the ends."""
    if not velocity:
        return {}
    zero = {name: torch.zeros_like(tensor[0]) for name, tensor in velocity.items()}
    curve = Path(zero, velocity, zero, kind=path.kind, points=None if path.free else len(path))
    return curve.refined(path.basis.size).interior


def _copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
