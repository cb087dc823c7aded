"""Permutation symmetries: which axes of a network's parameters are permuted together.

Relabelling the channels of a layer, and the inputs of every layer that reads them, leaves the
function of a network unchanged (Entezari et al., 2022; Ainsworth et al., "Git Re-Basin", 2022).
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Axes = dict[str, tuple[str | None, ...]]  # parameter -> the permutation of each leading axis
Permutations = dict[str, Tensor]  # permutation -> [size] int64: new position -> old index


def permutation_axes(state: Mapping[str, Tensor]) -> Axes:
    """The symmetries of `fastgeo.models.resnet` and `fastgeo.models.mlp`, by parameter names.

    Returns:
        A permutation, or None for an axis that stays, for every leading axis of each parameter.
        Axes of one permutation are permuted together.

    Raises:
        ValueError: names or shapes of another network.
    """
    axes = _resnet_axes(list(state)) if "conv1.weight" in state else _mlp_axes(list(state))
    lengths: dict[str, int] = {}
    for name in [*state, *axes]:
        known = name in state and name in axes and state[name].ndim >= len(axes[name])
        for axis, permutation in enumerate(axes[name] if known else ()):
            if permutation is not None:
                length = state[name].shape[axis]
                known = known and lengths.setdefault(permutation, length) == length
        if not known:
            raise ValueError(
                "weight matching knows the symmetries of fastgeo.models.resnet and mlp only, and "
                f"{name} is not as it is in either"
            )
    return axes


def _resnet_axes(names: list[str]) -> Axes:
    """One permutation for the residual stream of each group, one inside each block."""
    stream = "conv1"
    axes: Axes = {"conv1.weight": (stream, None)} | _norm("norm1", stream)
    blocks = {m[0] for name in names if (m := re.match(r"block_groups\.\d+\.blocks\.\d+", name))}
    for block in sorted(blocks, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
        inner, before = f"{block}.conv1", stream
        if f"{block}.shortcut.0.weight" in names:
            stream = f"{block}.shortcut"
            axes[f"{block}.shortcut.0.weight"] = (stream, before)
            axes |= _norm(f"{block}.shortcut.1", stream)
        axes[f"{block}.conv1.weight"] = (inner, before)
        axes |= _norm(f"{block}.norm1", inner)
        axes[f"{block}.conv2.weight"] = (stream, inner)
        axes |= _norm(f"{block}.norm2", stream)
    return axes | {"linear.weight": (None, stream), "linear.bias": (None,)}


def _mlp_axes(names: list[str]) -> Axes:
    layers = sorted({int(m[1]) for name in names if (m := re.match(r"layers\.(\d+)\.", name))})
    axes: Axes = {}
    before = None
    for i in layers:
        after = f"layers.{i}" if i != layers[-1] else None
        axes |= {f"layers.{i}.weight": (after, before), f"layers.{i}.bias": (after,)}
        before = after
    return axes


def _norm(name: str, permutation: str) -> Axes:
    return {f"{name}.weight": (permutation,), f"{name}.bias": (permutation,)}


def sizes(axes: Axes, state: Mapping[str, Tensor]) -> dict[str, int]:
    """The length of every permutation."""
    return {
        permutation: state[name].shape[axis]
        for name, permutations in axes.items()
        for axis, permutation in enumerate(permutations)
        if permutation is not None
    }


def random_permutations(
    axes: Axes, state: Mapping[str, Tensor], generator: torch.Generator
) -> Permutations:
    """A uniform draw from the group."""
    return {
        name: torch.randperm(size, generator=generator) for name, size in sizes(axes, state).items()
    }


def permute(
    axes: Axes,
    permutations: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The same network with relabelled channels: entry i of an axis is old entry permutation[i]."""
    return {
        name: _permute_tensor(tensor, axes[name], permutations) for name, tensor in state.items()
    }


def _permute_tensor(
    tensor: Tensor, axes: tuple[str | None, ...], permutations: Mapping[str, Tensor]
) -> Tensor:
    for axis, name in enumerate(axes):
        if name is not None:
            tensor = tensor.index_select(axis, permutations[name].to(tensor.device))
    return tensor
