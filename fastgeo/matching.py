"""Weight matching: permute one network towards another (Ainsworth et al., "Git Re-Basin", 2022).

Coordinate descent on the inner product of the parameters of a and of the permuted b, over all
parameters, biases and norm weights included: with every other permutation held fixed, the best one
of an axis is a linear assignment problem. No step lowers the objective.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.models import MLP, ResNet
from fastgeo.path import StateDict, check_same_form, state_dict
from fastgeo.permutation import (
    Axes,
    Permutations,
    permutation_axes,
    permute,
    sizes,
)


@dataclass(frozen=True)
class Matching:
    """What `match` returns.

    Attributes:
        state_dict: b with its channels permuted; it computes what b computes.
        permutations: name -> [size] int64, new position -> old index.
        objective_before, objective_after: inner product of a and b, and of a and the permuted b.
        sweeps: passes over all permutations, the last of which changed nothing (or the limit).
        seconds: wall time.
    """

    state_dict: dict[str, Tensor]
    permutations: Permutations
    objective_before: float
    objective_after: float
    sweeps: int
    seconds: float


def match(
    a: StateDict | nn.Module,
    b: StateDict | nn.Module,
    *,
    max_sweeps: int = 30,
    seed: int = 0,
    progress: bool = False,
) -> Matching:
    """Permute the channels of b to bring its parameters as near to a's as weight matching can.

    Args:
        a, b: two modules, or two state dicts, of `fastgeo.models.resnet` or `mlp`; not changed. A
            state dict is known by its names and shapes; that its network computes what these
            models compute is taken on trust.
        max_sweeps: limit on the sweeps over all permutations; stops earlier at a sweep that
            improves nothing.
        seed: of the order of the permutations within each sweep.
        progress: show a progress bar.

    Raises:
        TypeError: an argument that is neither a module nor a state dict.
        ValueError: ends that do not fit each other, or an architecture without known symmetries.

    Example:
        >>> a, b = resnet(8, 0.5), resnet(8, 0.5)
        >>> b.load_state_dict(match(a, b).state_dict)
        <All keys matched successfully>
    """
    started = time.perf_counter()
    for network in (a, b):
        if isinstance(network, nn.Module) and not isinstance(network, ResNet | MLP):
            raise ValueError(
                "weight matching knows the symmetries of fastgeo.models.resnet and mlp only, got "
                f"{type(network).__name__}"
            )
    a, b = state_dict(a), state_dict(b)
    check_same_form(a, b)
    if max_sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {max_sweeps}")
    axes = permutation_axes(a)
    fixed = {name: tensor.double() for name, tensor in a.items()}
    moving = {name: tensor.double() for name, tensor in b.items()}
    permutations = {name: torch.arange(size) for name, size in sizes(axes, a).items()}
    order = np.random.default_rng(seed)

    objective_before = _objective(fixed, moving)
    sweeps, improved = 0, True
    with tqdm(total=max_sweeps, desc="match", unit="sweep", disable=not progress) as bar:
        while improved and sweeps < max_sweeps:
            improved = False
            for name in order.permutation(sorted(permutations)):
                improved |= _improve(name, axes, permutations, fixed, moving)
            sweeps += 1
            bar.update()
    return Matching(
        state_dict=permute(axes, permutations, b),
        permutations=permutations,
        objective_before=objective_before,
        objective_after=_objective(fixed, permute(axes, permutations, moving)),
        sweeps=sweeps,
        seconds=time.perf_counter() - started,
    )


def _improve(
    name: str, axes: Axes, permutations: Permutations, fixed: StateDict, moving: StateDict
) -> bool:
    """Replace one permutation by the best one given all others; whether that gained anything."""
    gain = 0  # [new position, old index]: the inner product won by putting old there
    others = permutations | {name: torch.arange(len(permutations[name]))}
    for parameter, permuted in axes.items():
        if name in permuted:
            axis = permuted.index(name)
            b = permute({parameter: permuted}, others, {parameter: moving[parameter]})[parameter]
            rows = [t.movedim(axis, 0).reshape(t.shape[axis], -1) for t in (fixed[parameter], b)]
            gain = gain + rows[0] @ rows[1].T
    gain = gain.cpu().numpy()
    rows, best = linear_sum_assignment(gain, maximize=True)
    now = gain[rows, permutations[name].numpy()].sum()
    if gain[rows, best].sum() <= now + 1e-12 * np.abs(gain).max():
        return False
    permutations[name] = torch.from_numpy(best)
    return True


def _objective(a: StateDict, b: StateDict) -> float:
    return sum((a[name] * b[name]).sum().item() for name in a)
