"""The freedom of a network that is used up before it is matched: both ends in the same form.

The weight of a norm goes into the linear maps that read it, and becomes 1; its bias into their
biases, where all of them have one, else it is divided by the weight. Queries and keys, and values
and outputs, are contracted with each other within a head, so that any invertible map may act on
the one side and its inverse transpose on the other. Of all such pairs the balanced one is taken,
A A' = B B': it has the smallest sum of squares, and the condition number of each factor is the
square root of the product's. It is unique up to a rotation; the one nearest to what was there is
taken, and those of the two ends are matched.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastgeo.symmetry.spec import Block, Fold, PermutationSpec, nearest_orthogonal

LEAST = 1e-3  # of a norm's largest weight: by less than that no bias is divided


def folded(spec: PermutationSpec, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same network with every freedom used up but rotations and permutations, in float64.

    Raises:
        ValueError: a norm's bias can neither be folded nor divided by its weight.
    """
    new = {
        name: tensor.to(
            torch.float64 if tensor.is_floating_point() else None, copy=True
        ).contiguous()
        for name, tensor in state.items()
    }
    for fold in spec.folds:
        _fold(fold, new)
    for name, mixing in spec.mixed.items():
        if mixing.sides is not None and len(set(mixing.sides.values())) == 2:
            parts = [(spec.blocks[i], side) for i, side in mixing.sides.items()]
            _balance(name, parts, new)
    return new | {name: new[first].clone() for name, first in spec.tied.items() if name in new}


def _fold(fold: Fold, state: dict[str, Tensor]) -> None:
    weight = state[fold.weight].clone()
    if fold.bias is not None and state[fold.bias].any():
        bias = state[fold.bias]
        into = [(state[name], axis, own) for name, axis, own in fold.readers if own is not None]
        if len(into) == len(fold.readers) and all(matrix.ndim == 2 for matrix, _, _ in into):
            for matrix, axis, own in into:
                state[own] += torch.tensordot(matrix, bias, dims=([axis], [0]))
            bias.zero_()
        elif weight.abs().min() < LEAST * weight.abs().max():
            raise ValueError(
                f"{fold.bias} cannot be folded: {fold.weight} has weights near 0, and not all that "
                "read it have a bias; match with symmetries='permutation'"
            )
        else:
            bias /= weight
    for name, axis, _ in fold.readers:
        shape = [-1 if i == axis else 1 for i in range(state[name].ndim)]
        state[name] *= weight.view(shape)
    state[fold.weight].fill_(1)


def _balance(name: str, parts: list[tuple[Block, bool]], state: dict[str, Tensor]) -> None:
    """Balance the two sides of a contraction over channels, at each position of what they are
    within."""
    sides: dict[bool, list[tuple[Tensor, Tensor]]] = {True: [], False: []}
    for block, side in parts:
        axis = block.axes.index(name)
        places = (*block.within[axis], axis)
        own = block.of(state[block.tensor]).movedim(places, tuple(range(len(places))))
        sides[side].append((own, own.reshape(*own.shape[: len(places)], -1)))
    joined = (torch.cat([rows for _, rows in sides[side]], -1) for side in (True, False))
    for side, balanced in zip((True, False), _balanced(*joined), strict=True):
        widths = [rows.shape[-1] for _, rows in sides[side]]
        for (own, _), rows in zip(sides[side], balanced.split(widths, -1), strict=True):
            own.copy_(rows.reshape(own.shape))


def _balanced(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of a' b [..., rows, columns] for which A A' = B B', nearest to a and b."""
    channels = a.shape[-2]
    qa, ra = torch.linalg.qr(a.mT)  # a' b = qa (ra rb') qb'
    qb, rb = torch.linalg.qr(b.mT)
    left, values, right = torch.linalg.svd(ra @ rb.mT, full_matrices=False)
    values, root = values[..., :channels], values[..., :channels, None].sqrt()
    pair = [root * (qa @ left).mT[..., :channels, :], root * (right @ qb.mT)[..., :channels, :]]
    if values.shape[-1] < channels:  # of fewer numbers than channels
        pad = channels - values.shape[-1]
        pair = [torch.nn.functional.pad(own, (0, 0, 0, pad)) for own in pair]
    rotation = nearest_orthogonal(a @ pair[0].mT + b @ pair[1].mT)
    return rotation @ pair[0], rotation @ pair[1]
