"""Symmetries: which axes of a network's parameters are permuted, or mixed, together.

Relabelling the channels of a layer, and the inputs of every layer that reads them, leaves the
function of a network unchanged (Entezari et al., 2022; Ainsworth et al., "Git Re-Basin", 2022).
`fastgeo.permutation_spec` reads these symmetries off one pass of a network.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# Name -> int64 [size], or [sizes of what it is within ..., size]: new position -> old position. Of
# channels that are mixed an orthogonal matrix, float64 [..., size, size]: new position, old one.
Permutations = dict[str, Tensor]
ORTHOGONAL = 1e-8  # largest entry of Q Q' - 1


class Channels(NamedTuple):
    """Positions that are permuted together wherever they occur.

    Attributes:
        size: how many.
        within: names of others, outermost first, at each of whose positions the permutation is one
            of its own: the heads for the channels within a head.
    """

    size: int
    within: tuple[str, ...] = ()


class Mixing(NamedTuple):
    """Channels on which orthogonal maps act.

    Attributes:
        keeps_mean: whether the maps leave equal numbers on all positions as they are, for the sake
            of a LayerNorm.
        sides: number of each block with these channels -> whether it is on the one side, or the
            other, of the products that they are contracted in, where any invertible map may act on
            the one and its inverse transpose on the other; None if only orthogonal ones may.
    """

    keeps_mean: bool
    sides: dict[int, bool] | None


class Fold(NamedTuple):
    """A norm's weight, which goes into the linear maps that read the norm, and becomes 1.

    Attributes:
        weight, bias: names of the norm's, whose bias may be None.
        readers: name of each map's matrix, the axis that the norm is read by, and the name of its
            bias, or None.
    """

    weight: str
    bias: str | None
    readers: tuple[tuple[str, int, str | None], ...]


class Block(NamedTuple):
    """A part of a parameter or buffer, with an axis for each of its permutations.

    Attributes:
        tensor: its name.
        offset, sizes, strides: `t.contiguous().as_strided(sizes, strides, offset)` is the part.
        axes: the name of the permutation of each axis, None where it stays.
        within: for each axis the axes of the same block that its permutation is within.
    """

    tensor: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    axes: tuple[str | None, ...]
    within: tuple[tuple[int, ...], ...]

    def of(self, tensor: Tensor) -> Tensor:
        """A view of a contiguous tensor."""
        offset = tensor.storage_offset() + self.offset
        return tensor.as_strided(self.sizes, self.strides, offset)

    def permuted(self, part: Tensor, permutations: Mapping[str, Tensor]) -> Tensor:
        """The part with each axis permuted; those that are not given stay."""
        order = sorted(range(len(self.axes)), key=lambda axis: len(self.within[axis]))
        for axis in order:
            name = self.axes[axis]
            if name is not None and name in permutations:
                index = permutations[name].to(part.device)
                part = _permuted(part, axis, self.within[axis], index)
        return part


def _permuted(part: Tensor, axis: int, within: tuple[int, ...], index: Tensor) -> Tensor:
    if index.is_floating_point():
        return mixed_along(part, axis, within, index)
    if not within:
        return part.index_select(axis, index)
    places = (*within, axis)
    index = index.permute(sorted(range(len(places)), key=places.__getitem__))
    shape = [part.shape[i] if i in places else 1 for i in range(part.ndim)]
    return torch.take_along_dim(part, index.reshape(shape), axis)


def nearest_orthogonal(matrices: Tensor, keeps_mean: bool = False) -> Tensor:
    """The orthogonal matrices Q [..., n, n] of the largest inner products with some; where they are
    to keep the mean, of those with Q 1 = 1."""
    if keeps_mean:
        basis = _complement(matrices.shape[-1]).to(matrices)
        inside = nearest_orthogonal(basis.mT @ matrices @ basis)
        return basis @ inside @ basis.mT + 1 / matrices.shape[-1]
    left, _, right = torch.linalg.svd(matrices)
    return left @ right


def _complement(size: int) -> Tensor:
    """Orthonormal columns [size, size - 1] whose sums are 0."""
    square = torch.eye(size, dtype=torch.float64)
    square[:, 0] = 1
    return torch.linalg.qr(square).Q[:, 1:]


def mixed_along(part: Tensor, axis: int, within: tuple[int, ...], matrices: Tensor) -> Tensor:
    """A matrix applied along an axis, one of its own at each position of others."""
    places = (*within, axis)
    first = tuple(range(len(places)))
    moved = part.movedim(places, first)  # [outer positions ..., position, ...]
    rows = matrices.to(moved.dtype) @ moved.reshape(*matrices.shape[:-1], -1)
    return rows.reshape(moved.shape).movedim(first, places)


@dataclass(frozen=True)
class PermutationSpec:
    """The permutations that leave the function of a network as it is.

    Attributes:
        channels: name of each permutation -> how many positions it has, and what it is within. A
            name is that of the first parameter with them and the axis, `conv1.weight[0]`, with a
            number behind it where several permutations act on parts of the axis.
        blocks: the parts of all parameters and buffers that are permuted.
        axes: name of each parameter -> for each axis the permutations that act on it.
        fixed: name of each parameter -> axis -> why it stays, or a part of it.
        tied: further names of parameters -> the first one, which the others use.
        buffers: names of tensors that are permuted and do not count as parameters.
        module: class of the network.
        mixed: those of `channels` on which orthogonal maps act; none unless they were asked for.
        folds: weights of norms that have to be folded for that.
        permuted_only: those of the other channels that a norm reads -> why they are not mixed.
    """

    channels: dict[str, Channels]
    blocks: tuple[Block, ...]
    axes: dict[str, tuple[tuple[str, ...], ...]]
    fixed: dict[str, dict[int, str]]
    tied: dict[str, str]
    buffers: frozenset[str]
    module: str
    mixed: dict[str, Mixing] = field(default_factory=dict)
    folds: tuple[Fold, ...] = ()
    permuted_only: dict[str, str] = field(default_factory=dict)

    def identity(self) -> Permutations:
        """Every position where it is."""
        whole = {name: torch.arange(own.size) for name, own in self.channels.items()}
        stay = {name: index.expand(self._shape(name)).clone() for name, index in whole.items()}
        return self.as_matrices(stay)

    def random(self, generator: torch.Generator | None = None) -> Permutations:
        """A uniform draw from the group."""
        drawn = {
            name: torch.rand(self._shape(name), generator=generator).argsort(-1)
            for name in self.channels
        }
        for name, own in self.mixed.items():
            shape = (*self._shape(name), self.channels[name].size)
            matrices = torch.randn(shape, generator=generator, dtype=torch.float64)
            drawn[name] = nearest_orthogonal(matrices, own.keeps_mean)
        return drawn

    def as_matrices(self, permutations: Mapping[str, Tensor]) -> Permutations:
        """Permutations of channels that are mixed as matrices; the others as they are."""
        eye = {name: torch.eye(self.channels[name].size).double() for name in self.mixed}
        return {
            name: eye[name][index] if name in eye and not index.is_floating_point() else index
            for name, index in permutations.items()
        }

    def permute(
        self, state: Mapping[str, Tensor], permutations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same network with relabelled channels, copied.

        Args:
            state: parameters and buffers as in `state_dict()`; others are copied as they are.
            permutations: some of `channels` or all, as `identity` and `random` give them: entry i
                is the old position of what goes to position i. One that is within others has an
                entry for each of their new positions.

        Raises:
            ValueError: a permutation that is not one of the network's.
        """
        self.check(permutations)
        permuted = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        for block in self.blocks:
            if block.tensor in state and not permutations.keys().isdisjoint(block.axes):
                old = block.of(state[block.tensor].contiguous())
                block.of(permuted[block.tensor]).copy_(block.permuted(old, permutations))
        for name, first in self.tied.items():
            if name in state and first in state:
                permuted[name] = permuted[first].clone()
        return permuted

    def counted(self, state: Mapping[str, Tensor]) -> list[str]:
        """The names in a state that count in the distance of two networks: every parameter once,
        under the first of its names."""
        return [name for name in state if name not in self.buffers and name not in self.tied]

    def pairs(
        self, a: Mapping[str, Tensor], b: Mapping[str, Tensor]
    ) -> list[tuple[Block, Tensor, Tensor]]:
        """The blocks of all parameters, and those parts of two states."""
        return [
            (block, block.of(a[block.tensor].contiguous()), block.of(b[block.tensor].contiguous()))
            for block in self.blocks
            if block.tensor not in self.buffers
        ]

    def check(self, permutations: Mapping[str, Tensor]) -> None:
        """ValueError, naming it, unless every one is a permutation of the network's."""
        for name, index in permutations.items():
            if name not in self.channels:
                raise ValueError(f"{name} is not one of the permutations of {self.module}")
            shape = self._shape(name)
            if name in self.mixed:
                self._check_matrices(name, index)
                continue
            whole = torch.arange(shape[-1], device=index.device).expand(shape)
            if index.shape != shape or not torch.equal(index.sort(-1).values, whole):
                raise ValueError(f"{name} must hold permutations of {shape[-1]}, {list(shape)}")

    def _check_matrices(self, name: str, matrices: Tensor) -> None:
        shape = (*self._shape(name), self.channels[name].size)
        eye = torch.eye(shape[-1], dtype=torch.float64, device=matrices.device)
        if (
            matrices.shape != shape
            or not matrices.is_floating_point()
            or not torch.allclose(matrices @ matrices.mT, eye, rtol=0, atol=ORTHOGONAL)
        ):
            raise ValueError(f"{name} must hold orthogonal matrices, {list(shape)}")

    def __repr__(self) -> str:
        """How much is permuted and what stays, in a few lines; `print` gives all of it."""
        channels = sum(own.size for own in self.channels.values())
        stay = [f"{name}[{axis}]" for name, axes in self.fixed.items() for axis in axes]
        more = f" and {len(stay) - 3} more axes" if len(stay) > 3 else ""
        return (
            f"PermutationSpec of {self.module}:\n"
            f"  {len(self.channels)} permutations, of {channels} channels in all\n"
            f"  what stays: {', '.join(stay[:3]) or 'nothing'}{more}"
        )

    def __str__(self) -> str:
        """What is permuted, what stays and why."""
        lines = [f"{self.module}: {len(self.channels)} permutations"]
        for name, own in self.channels.items():
            inside = f", within {' and '.join(own.within)}" if own.within else ""
            lines.append(f"  {name}: {own.size} positions{inside}{self._maps(name)}")
        reasons: dict[str, list[str]] = {}
        for name, axes in self.fixed.items():
            for axis, why in axes.items():
                reasons.setdefault(why, []).append(f"{name}[{axis}]")
        lines += ["fixed:"] if reasons else []
        lines += [f"  {', '.join(names)}: {why}" for why, names in reasons.items()]
        return "\n".join(lines)

    def _maps(self, name: str) -> str:
        """What acts on channels besides permutations, or why nothing does."""
        if name in self.permuted_only:
            return f"; permutations only: {self.permuted_only[name]}"
        if name not in self.mixed:
            return ""
        mixing = self.mixed[name]
        if mixing.sides is not None:
            return "; any invertible map"
        return "; orthogonal maps" + (" that keep the mean" if mixing.keeps_mean else "")

    def _shape(self, name: str) -> tuple[int, ...]:
        own = self.channels[name]
        return (*(self.channels[outer].size for outer in own.within), own.size)
