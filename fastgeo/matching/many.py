"""Several networks in a common frame: each permuted towards the others, none of them privileged.

Coordinate ascent on the sum of the inner products of all pairs: each network in turn is matched to
the sum of the others, family by family (`fastgeo.matching.assignment`). With every network mapped
to one frame, the maps between networks agree with each other, as in Crisostomi et al., "C2M3:
Cycle-Consistent Multi-Model Merging" (2024).
"""

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.data.inputs import Inputs
from fastgeo.evaluate import Data, evaluate
from fastgeo.forward.options import Forward
from fastgeo.matching.assignment import Assignment
from fastgeo.matching.pair import (
    check_same_function,
    loaded,
    permuted,
    same_network,
    warn_of_nothing,
)
from fastgeo.path import Path, StateDict, size_of
from fastgeo.step.agreement import refuse_random
from fastgeo.symmetry.derive import Symmetries, example
from fastgeo.symmetry.spec import Permutations, PermutationSpec

BARRIER_POINTS = 11  # on the line between two networks


@dataclass(frozen=True)
class CommonFrame:
    """What `match_many` returns, K networks in the order given.

    Attributes:
        state_dicts: of the permuted networks; each computes what it did.
        permutations: of each network, as in `Matching`.
        spec: the symmetries of the network.
        objectives_before, objectives_after: [K, K] inner products of the parameters of each pair.
        objectives: their sum over pairs at the end of each restart; the largest was kept.
        barriers_before, barriers_after: [K, K] barriers of the lines between each pair, highest
            loss less the mean of the two ends, nats; None without data.
        sweeps: passes over all permutations of all networks of the restart that was kept.
        relative_change: as in `Matching`, the largest of all networks.
        seconds: wall time without that of the barriers.
    """

    state_dicts: list[dict[str, Tensor]]
    permutations: list[Permutations]
    spec: PermutationSpec
    objectives_before: Tensor
    objectives_after: Tensor
    objectives: list[float]
    barriers_before: Tensor | None
    barriers_after: Tensor | None
    sweeps: int
    relative_change: float
    seconds: float
    _networks: list[StateDict | nn.Module] = field(repr=False)

    @functools.cached_property
    def modules(self) -> list[nn.Module | None]:
        """Copies of the networks with these states, None for those given as state dicts."""
        return [loaded(*pair) for pair in zip(self._networks, self.state_dicts, strict=True)]

    def average(self) -> dict[str, Tensor]:
        """The mean of the permuted networks, a state dict, summed in float64.

        Entries that are not floating point, such as counters, are those of the first network. The
        running statistics of a BatchNorm are averaged like all else, and are not those of the
        averaged network: have them computed anew, as `torch.optim.swa_utils.update_bn` does.
        """
        first, count = self.state_dicts[0], len(self.state_dicts)
        averaged = {}
        for name, tensor in first.items():
            averaged[name] = tensor.clone()
            if tensor.is_floating_point() or tensor.is_complex():
                exact = torch.promote_types(tensor.dtype, torch.float64)
                total = torch.zeros_like(tensor, dtype=exact)
                for state in self.state_dicts:
                    total += state[name]
                averaged[name] = (total / count).to(tensor.dtype)
        return averaged

    def __repr__(self) -> str:
        pairs = _pairs(len(self.state_dicts))
        lines = [
            f"CommonFrame of {len(self.state_dicts)} networks, {self.spec.module}, "
            f"{size_of(self.state_dicts[0])} each",
            f"  {permuted(self.spec)} of each network",
        ]
        for what, unit, before, after in (
            ("inner product", "", self.objectives_before, self.objectives_after),
            ("barrier", ", nats", self.barriers_before, self.barriers_after),
        ):
            if before is not None and after is not None:
                was, now = (
                    [f"{worst(of[pair].item() for pair in pairs):.3f}" for worst in (min, max)]
                    for of in (before, after)
                )
                lines.append(
                    f"  {what} of a pair{unit}: {' to '.join(was)} before, {' to '.join(now)} after"
                )
        lines += [
            f"  outputs as before within {self.relative_change:.0e} of the largest",
            f"  sweeps: {self.sweeps}, {self.seconds:.1f} s",
        ]
        return "\n".join(lines)


def match_many(
    networks: Sequence[StateDict | nn.Module],
    example_input: Inputs | None = None,
    *,
    module: nn.Module | None = None,
    data: Data | None = None,
    restarts: int = 2,
    max_sweeps: int = 30,
    seed: int = 0,
    batchnorm: Literal["refuse", "recalibrate"] = "refuse",
    progress: bool = False,
) -> CommonFrame:
    """Permute the channels of several networks to bring them all near to each other.

    Args:
        networks: K modules or state dicts of one module, at least two; not changed.
        example_input, module: as in `match`.
        data: labelled inputs for the barriers, (inputs, labels) or an iterable of such batches, as
            a split of `evaluate`; without it there are none.
        restarts: starts of the ascent, the best of which is kept. The first is from the networks as
            they are; the second assigns one network after the other from the fixed axes inwards;
            further ones start from random permutations.
        max_sweeps: limit on the sweeps over all permutations of all networks in each.
        seed: of the order of networks and permutations, and of random starts.
        batchnorm: of the barriers, as in `evaluate`.
        progress: show a progress bar, if it takes more than a second.

    Warns:
        UserWarning: as in `match`.

    Raises:
        TypeError, ValueError: as in `match` and `evaluate`; fewer than two networks.

    Example:
        >>> frame = match_many([a, b, c], images, data=(images, labels))
        >>> frame.barriers_before.max(), frame.barriers_after.max()
        (tensor(2.0312), tensor(0.4120))
    """
    started = time.perf_counter()
    networks = list(networks)
    if len(networks) < 2:
        raise ValueError(f"networks must be at least two, got {len(networks)}")
    for name, number in (("sweeps", max_sweeps), ("restarts", restarts)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    module, states = same_network(networks, module)
    inputs = example(module, example_input)
    refuse_random(module, {}, inputs)
    spec = Symmetries(module, inputs).spec
    warn_of_nothing(spec)
    names = spec.counted(states[0])
    wide = [{name: state[name].double() for name in names} for state in states]
    found = []
    with tqdm(
        total=restarts * max_sweeps, desc="match", unit="sweep", disable=not progress, delay=1
    ) as bar:
        for restart in range(restarts):
            frame = _Frame(spec, wide)
            frame.start(restart, seed + restart)
            sweeps = frame.ascend(max_sweeps, seed + restart, bar)
            bar.update((restart + 1) * max_sweeps - bar.n)
            permutations = [assignment.permutations for assignment in frame.assignments]
            moved = [spec.permute(*pair) for pair in zip(wide, permutations, strict=True)]
            products = inner_products(moved)
            found.append((products.triu(1).sum().item(), products, permutations, sweeps))
    _, products, permutations, sweeps = max(found, key=lambda one: one[0])
    matched = [spec.permute(*pair) for pair in zip(states, permutations, strict=True)]
    changes = [
        check_same_function(module, *pair, inputs) for pair in zip(states, matched, strict=True)
    ]
    seconds = time.perf_counter() - started
    before = after = None
    if data is not None:
        before, after = (
            _barriers(module, own, data, batchnorm, progress) for own in (states, matched)
        )
    return CommonFrame(
        state_dicts=matched,
        permutations=permutations,
        spec=spec,
        objectives_before=inner_products(wide),
        objectives_after=products,
        objectives=[one[0] for one in found],
        barriers_before=before,
        barriers_after=after,
        sweeps=sweeps,
        relative_change=max(changes),
        seconds=seconds,
        _networks=networks,
    )


class _Frame:
    """The networks as they are permuted so far, and the sum of them."""

    def __init__(self, spec: PermutationSpec, states: Sequence[StateDict]):
        self.spec = spec
        self.assignments = [Assignment(spec, spec.pairs(state, state)) for state in states]
        self.sums: list[Tensor] = []

    def start(self, restart: int, seed: int) -> None:
        """As the networks are, then one after the other inwards, then random."""
        generator = torch.Generator().manual_seed(seed)
        if restart == 1:
            first, *others = torch.randperm(len(self.assignments), generator=generator).tolist()
            sums = self.assignments[first].parts()
            for k in others:
                for i, part in enumerate(sums):
                    self.assignments[k].against(i, part)
                self.assignments[k].assign_inwards()
                sums = [x + y for x, y in zip(sums, self.assignments[k].parts(), strict=True)]
        elif restart:
            for assignment in self.assignments:
                assignment.move(self.spec.random(generator))
        parts = zip(*(assignment.parts() for assignment in self.assignments), strict=True)
        self.sums = [torch.stack(own).sum(0) for own in parts]

    def ascend(self, max_sweeps: int, seed: int, bar: tqdm) -> int:
        """Match each network to the sum of the others, by turns; how many sweeps it took."""
        order = np.random.default_rng(seed)
        for sweep in range(1, max_sweeps + 1):
            improved = False
            for family in order.permutation(self.assignments[0].families):
                for k in order.permutation(len(self.assignments)):
                    improved |= self._improve(self.assignments[k], family)
            bar.update()
            if not improved:
                return sweep
        return max_sweeps

    def _improve(self, assignment: Assignment, family: str) -> bool:
        own = assignment.of[family]
        for i in own:
            assignment.against(i, self.sums[i] - assignment.part(i))
        if not assignment.improve(family):
            return False
        for i in own:
            self.sums[i] = assignment.a[i] + assignment.part(i)
        return True


def inner_products(states: Sequence[StateDict]) -> Tensor:
    """[K, K], of each pair of states of the same parameters, in float64."""
    total = torch.zeros(len(states), len(states), dtype=torch.float64)
    for name in states[0]:
        rows = torch.stack([state[name].double().flatten() for state in states])
        total += (rows @ rows.T).cpu()
    return total


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i)]


def _barriers(
    module: nn.Module,
    states: Sequence[StateDict],
    data: Data,
    batchnorm: Literal["refuse", "recalibrate"],
    progress: bool,
) -> Tensor:
    barriers = torch.zeros(len(states), len(states))
    for i, j in tqdm(
        _pairs(len(states)), desc="barriers", unit="line", disable=not progress, delay=1
    ):
        line = Path.linear(states[i], states[j], BARRIER_POINTS, batchnorm=batchnorm)
        result = evaluate(line, module, {"data": data}, forward=Forward(batchnorm=batchnorm))
        barriers[i, j] = barriers[j, i] = result.splits["data"].barrier
    return barriers
