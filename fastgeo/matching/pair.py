"""Matching: permute, or mix, the channels of one network towards another.

By weights, coordinate descent on the inner product of the parameters of a and of the permuted b
(Ainsworth et al., "Git Re-Basin", 2022), biases, norm weights and all other parameters included:
with every other family of permutations held fixed, the best one is found by linear assignment
(`fastgeo.matching.assignment`). No step lowers the objective. By activations, the assignment that
correlates the features on a batch the most (`fastgeo.matching.activations`).

With all symmetries (`fastgeo.symmetry.mixing`) both networks are brought to the same form first
(`fastgeo.matching.folding`), then permuted, and from there on rotations take part in the descent.
"""

import copy
import functools
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fastgeo.data.inputs import Inputs, arguments, tensors_by_name, tensors_within
from fastgeo.forward.modes import looked_at
from fastgeo.matching.activations import correlations
from fastgeo.matching.assignment import Assignment, inner
from fastgeo.matching.folding import folded
from fastgeo.matching.relaxation import Relaxation
from fastgeo.path import StateDict, check_same_form, check_tied, size_of, state_of, uncompiled
from fastgeo.step.agreement import refuse_random
from fastgeo.symmetry.derive import Symmetries, example
from fastgeo.symmetry.mixing import with_mixing
from fastgeo.symmetry.spec import Permutations, PermutationSpec

SAME_FUNCTION = 1e-10  # relative change of outputs by a permutation, in float64
ROUNDINGS = 10  # times as much as rounding all parameters does may a permutation change
METHODS = ("weights", "activations")
SYMMETRIES = ("permutation", "all")
RELAXED_STEPS = 100  # at most; it nearly always stops long before
DELAY = 1  # seconds, before which there is no progress bar
LEAST_WORK = 5e10  # FLOP, about a second: so much work a start may do, if the first did less


@dataclass(frozen=True)
class Matching:
    """What `match` returns.

    Attributes:
        state_dict: b with its channels permuted; it computes what b computes.
        a: what it is to be joined with: the state of a, with all symmetries in the form that
            `state_dict` has, too, which computes what a computes.
        permutations: name -> int64 [..., size], new position -> old position (`PermutationSpec`),
            or, of channels that are mixed, orthogonal matrices [..., size, size].
        spec: the symmetries of the network; `print(spec)` says what is permuted, what stays and
            why.
        objective_before, objective_after: inner product of the parameters of a and b, and of a and
            the permuted b.
        objectives: the latter at the end of each restart; the largest was kept.
        sweeps: passes over all permutations of the restart that was kept, the last of which
            improved nothing (or the limit); 0 for activations.
        relative_change: largest difference of the outputs of b and of the permuted b on the example
            input, over the largest output, with parameters in float64: rotated ones are rounded to
            the types that the states have after that.
        seconds: wall time.
        left_out: what was not done, since no start may do more work than the first one.
    """

    state_dict: dict[str, Tensor]
    a: StateDict
    permutations: Permutations
    spec: PermutationSpec
    objective_before: float
    objective_after: float
    objectives: list[float]
    sweeps: int
    relative_change: float
    seconds: float
    left_out: list[str]
    _b: nn.Module | None = field(repr=False)

    @functools.cached_property
    def module(self) -> nn.Module | None:
        """A copy of b with this state, if b was given as a module; else None."""
        return loaded(self._b, self.state_dict)

    def __repr__(self) -> str:
        starts = ", ".join(f"{objective:.2f}" for objective in self.objectives)
        return (
            f"Matching of {self.spec.module}, {size_of(self.state_dict)}\n"
            f"  {permuted(self.spec)}\n"
            f"  inner product of the parameters: {self.objective_before:.2f} before, "
            f"{self.objective_after:.2f} after; by starts: {starts}\n"
            f"  outputs as before within {self.relative_change:.0e} of the largest\n"
            f"  sweeps: {self.sweeps}, {self.seconds:.1f} s"
            + (f"; left out: {', '.join(self.left_out)}" if self.left_out else "")
        )


def match(
    a: StateDict | nn.Module,
    b: StateDict | nn.Module,
    example_input: Inputs | None = None,
    *,
    module: nn.Module | None = None,
    symmetries: str = "permutation",
    method: str = "weights",
    restarts: int = 3,
    max_sweeps: int = 30,
    seed: int = 0,
    progress: bool = False,
) -> Matching:
    """Permute the channels of b to bring its parameters, or its features, near to a's.

    The permutations are those that `permutation_spec` finds. The objective is the inner product of
    the parameters of a and the permuted b; what it gains, their squared distance loses twice.

    Args:
        a, b: two modules, or two state dicts of one module; neither changed nor copied as modules.
        example_input: a batch, as in `permutation_spec`. On it b and the permuted b are compared,
            and features correlated: the more and the more real the inputs, the better.
        module: the network of both, needed if both are given as state dicts.
        symmetries: "permutation", or "all": rotations of a transformer's residual stream, too,
            and invertible maps within its heads. They need both networks in the same form, the
            weights of norms folded into what reads them, and queries with keys and values with
            outputs balanced: a path goes from `Matching.a`, not from a. `print(matching.spec)` says
            which channels take which maps, and why others only take permutations.
        method: "weights", or "activations": the features' correlations alone.
        restarts: starts of the coordinate descent, the best of which is kept. The first is the
            usual one, from b as it is; the second assigns every permutation once, from the fixed
            axes inwards, by what is assigned already; the third goes from the activations through
            mixtures of permutations (`fastgeo.matching.relaxation`); further ones are random. Each
            may do as much work as the first, so that three take at most about three times as long
            as one; work is counted in FLOP, and the result does not depend on the machine's speed.
            With all symmetries two more descents follow, in which rotations take part: from the
            best permutations, and from the fixed axes inwards.
        max_sweeps: limit on the sweeps over all permutations in each; one that improves nothing is
            the last.
        seed: of the order of the permutations within each sweep, and of random starts.
        progress: show a progress bar, if it takes more than a second.

    Warns:
        UserWarning: nothing to permute, and why.

    Raises:
        TypeError: an argument that is neither a module nor a state dict, or is TorchScript.
        ValueError: ends that do not fit each other or the module, an input that the module cannot
            be evaluated on, none where one is needed, activations with all symmetries, or a
            permuted b that does not compute what b does.

    Example:
        >>> matching = match(a, b, images)
        >>> matching.objective_before, matching.objective_after
        (182.3, 228.5)
        >>> path = Path.linear(a, matching.module, 25)
    """
    started = time.perf_counter()
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    for name, number in (("sweeps", max_sweeps), ("restarts", restarts)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if symmetries not in SYMMETRIES:
        raise ValueError(f"symmetries must be one of {', '.join(SYMMETRIES)}, got {symmetries!r}")
    if symmetries == "all" and method != "weights":
        raise ValueError("all symmetries are matched by weights only")
    module, (first, second) = same_network([a, b], module)
    inputs = example(module, example_input)
    found_symmetries = Symmetries(module, inputs)
    refuse_random(module, {}, inputs)
    warn_of_nothing(found_symmetries.spec)
    spec, ends = found_symmetries.spec, (first, second)
    if symmetries == "all":
        spec = with_mixing(found_symmetries, equal_in(first) & equal_in(second))
        ends = folded(spec, first), folded(spec, second)
    objective = Objective(replace(spec, mixed={}), *ends)
    starts: list[tuple[str, ...]] = [("activations",)]
    if method == "weights":
        starts = STARTS[:restarts] + [("random",)] * (restarts - len(STARTS))
    found: list[_Climb] = []
    with tqdm(desc="match", unit="class", disable=not progress, delay=DELAY) as bar:
        for ways in starts:
            bar.set_description(f"match, start {len(found) + 1} of {len(starts)}", refresh=False)
            assignment = objective.assignment(max(found[0].work, LEAST_WORK) if found else math.inf)
            for way in ways:
                number = seed + len(found)
                start_from(way, assignment, found_symmetries, *ends, inputs, number)
            sweeps = 0
            if method == "weights":
                if not found:
                    bar.total = len(starts) * max_sweeps * len(assignment.families)
                sweeps = descend(assignment, max_sweeps, seed + len(found), bar)
            found.append(_Climb.of(assignment, objective, sweeps))
            del assignment  # and what it keeps
            bar.total = bar.n * len(starts) // len(found)  # if the others take as long
        if spec.mixed:
            start = max(found, key=lambda one: one.objective)
            found += rotated(Objective(spec, *ends), start, max_sweeps, seed, bar)
    best = max(found, key=lambda one: one.objective)
    permutations = spec.as_matrices(best.permutations)
    matched = spec.permute(ends[1], permutations)
    changes = [check_same_function(module, second, matched, inputs)]
    joined_a: StateDict = first
    if symmetries == "all":
        changes.append(check_same_function(module, first, ends[0], inputs))
        joined_a, matched = (
            {name: t.to(own[name].dtype) for name, t in state.items()}
            for own, state in ((first, ends[0]), (second, matched))
        )
    return Matching(
        state_dict=matched,
        a=joined_a,
        permutations=permutations,
        spec=spec,
        objective_before=objective({}),
        objective_after=best.objective,
        objectives=[one.objective for one in found],
        sweeps=best.sweeps,
        relative_change=max(changes),
        seconds=time.perf_counter() - started,
        left_out=[
            f"{what} of start {i}" for i, one in enumerate(found, 1) for what in one.left_out
        ],
        _b=b if isinstance(b, nn.Module) else None,
    )


def rotated(
    objective: "Objective", best: "_Climb", max_sweeps: int, seed: int, bar: tqdm
) -> list["_Climb"]:
    """Descents in which rotations take part: from the best permutations, and from the fixed axes
    inwards."""
    found: list[_Climb] = []
    for inwards in (False, True):
        assignment = objective.assignment()
        if inwards:
            assignment.assign_inwards()
        else:
            assignment.move(objective.spec.as_matrices(best.permutations))
        sweeps = descend(assignment, max_sweeps, seed + len(found), bar)
        found.append(_Climb.of(assignment, objective, sweeps))
    return found


def equal_in(state: StateDict) -> set[str]:
    """The names of parameters whose numbers are all equal."""
    return {name for name, t in state.items() if t.numel() and bool((t == t.flatten()[0]).all())}


def permuted(spec: PermutationSpec) -> str:
    """How much of a network is permuted, in words."""
    sizes = [own.size for own in spec.channels.values()]
    mixed = f", {len(spec.mixed)} of them orthogonal maps" if spec.mixed else ""
    span = f" of {min(sizes)} to {max(sizes)}" if sizes else ""
    return f"{len(sizes)} permutations{span}{mixed}"


def warn_of_nothing(spec: PermutationSpec) -> None:
    """If a network has no permutation, and why."""
    if not spec.channels:
        whys = [f": {why}" for axes in spec.fixed.values() for why in axes.values()]
        text = f"{spec.module} has no channels to permute{whys[0] if whys else ''}"
        warnings.warn(text, stacklevel=3)


STARTS: list[tuple[str, ...]] = [(), ("inwards",), ("activations", "relaxed")]


class Objective:
    """The inner product of the parameters of a and the permuted b, in float64."""

    def __init__(self, spec: PermutationSpec, a: StateDict, b: StateDict):
        self.spec, self.pairs = spec, spec.pairs(a, b)
        whole = sum(inner(a[name], b[name]) for name in spec.counted(a))
        self.rest = whole - sum(inner(*parts) for _, *parts in self.pairs)  # is not permuted

    def __call__(self, permutations: Permutations) -> float:
        pairs = ((a, block.permuted(b, permutations)) for block, a, b in self.pairs)
        return self.rest + sum(inner(*pair) for pair in pairs)

    def assignment(self, most_work: float = math.inf) -> Assignment:
        return Assignment(self.spec, self.pairs, most_work)


class _Climb(NamedTuple):
    """What came of a start."""

    objective: float
    sweeps: int
    permutations: Permutations
    work: float
    left_out: list[str]

    @classmethod
    def of(cls, assignment: Assignment, objective: Objective, sweeps: int) -> "_Climb":
        permutations = assignment.permutations
        work, left_out = assignment.work, assignment.left_out
        return cls(objective(permutations), sweeps, permutations, work, left_out)


def start_from(
    way: str,
    assignment: Assignment,
    symmetries: Symmetries,
    a: StateDict,
    b: StateDict,
    inputs: Inputs,
    seed: int,
) -> None:
    """Permute b for a start of the descent."""
    if way == "inwards":
        assignment.assign_inwards()
    elif way == "activations":
        assignment.assign(correlations(symmetries, a, b, inputs))
    elif way == "relaxed":
        half = (assignment.work + assignment.most_work) / 2  # the descent needs the other
        Relaxation(assignment).ascend(RELAXED_STEPS, half)
    elif way == "random":
        assignment.move(symmetries.spec.random(torch.Generator().manual_seed(seed)))


def descend(assignment: Assignment, max_sweeps: int, seed: int, bar: tqdm) -> int:
    """Improve one family after the other, in a random order; returns how many sweeps it took."""
    order = np.random.default_rng(seed)
    waiting = set(assignment.families)  # the others cannot improve
    for sweep in range(1, max_sweeps + 1):
        improved = False
        for family in order.permutation(assignment.families):
            if family in waiting:
                if assignment.work >= assignment.most_work:
                    assignment.left_out.append(f"all from sweep {sweep} on")
                    return sweep
                waiting.discard(family)
                if assignment.improve(family):
                    improved = True
                    waiting |= assignment.neighbours(family)
            bar.update()
        if not improved:
            return sweep
    return max_sweeps


def same_network(
    networks: Sequence[StateDict | nn.Module], module: nn.Module | None
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """The module of several networks, and their states, which are not copied.

    Raises:
        TypeError, ValueError: as in `match`.
    """
    states = [state_of(network) for network in networks]
    for state in states[1:]:
        check_same_form(states[0], state, batchnorm="recalibrate")
    module = next((m for m in (module, *networks) if isinstance(m, nn.Module)), None)
    if module is None:
        raise ValueError("state dicts do not say what network they are of; give it as module")
    module = uncompiled(module)
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if name not in states[0]:
            raise ValueError(f"{name} is a parameter of the module and not in the state dicts")
        if states[0][name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(states[0][name].shape)} in the state dicts and "
                f"{list(tensor.shape)} in the module"
            )
    own = tensors_by_name(module)
    for name in states[0]:
        if name not in own:
            raise ValueError(f"{name} is in the state dicts and not in the module")
    for i, state in enumerate(states):
        check_tied(state, module, f"network {i + 1}")
    return module, states


def check_same_function(
    module: nn.Module, before: StateDict, after: StateDict, inputs: Inputs
) -> float:
    """Largest difference of the outputs of two states of a module, over the largest output.

    Computed in float64, where a permutation changes no more than the order of sums, or where the
    module's forward does not allow that, in its own types. If the module computes some of it in a
    coarser type, the same is asked of that: as a measure of what rounding does there, parameters
    are changed by one rounding of that type.

    Raises:
        ValueError: they differ by more than rounding.
    """
    exact = True
    with _Coarsest() as coarsest:
        try:
            was = _outputs(module, before, inputs)
        except RuntimeError:  # a forward that names the types it computes in
            exact = False
            was = _outputs(module, before, inputs, exact=False)
    change = _change(was, _outputs(module, after, inputs, exact=exact))
    bound = SAME_FUNCTION
    if coarsest.eps > torch.finfo(torch.float64).eps:
        rounded = _outputs(module, before, inputs, exact=exact, rounding=coarsest.eps)
        bound = max(bound, ROUNDINGS * _change(was, rounded))
    if not change <= bound:
        raise ValueError(
            "the permuted network does not compute what b does: its outputs differ by "
            f"{change:.1e} of the largest"
        )
    return change


class _Coarsest(TorchFunctionMode):
    """Notes the rounding, relative, of the coarsest type in which something is computed."""

    eps = torch.finfo(torch.float64).eps

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                self.eps = max(self.eps, torch.finfo(leaf.dtype).eps)
        return out


def _outputs(
    module: nn.Module,
    state: StateDict,
    inputs: Inputs,
    *,
    exact: bool = True,
    rounding: float = 0.0,
) -> list[Tensor]:
    """What a module returns in another state, each number of which may be rounded up or down; in
    float64 if exact, else in the types that it has."""
    copied = _exact if exact else torch.clone
    generator = torch.Generator().manual_seed(0)
    own = tensors_by_name(module)
    made: dict[Tensor, Tensor] = {}  # tensors may have several names
    for name, tensor in own.items():
        if tensor not in made:
            made[tensor] = value = copied(state.get(name, tensor)).to(
                tensor.device, None if exact else tensor.dtype
            )
            if rounding and value.is_floating_point():
                up = torch.rand(value.shape, generator=generator).to(value) < 0.5
                value *= 1 + rounding * (2 * up - 1)
        own[name] = made[tensor]
    args, kwargs = pytree.tree_map_only(Tensor, copied, arguments(module, inputs))
    with looked_at(module):
        out = functional_call(module, own, args, kwargs, tie_weights=False)
    return [leaf if leaf.is_complex() else leaf.double() for leaf in tensors_within(out)]


def _exact(tensor: Tensor) -> Tensor:
    """A copy, in float64 if it is of floating point."""
    if tensor.is_complex():
        return tensor.to(torch.complex128, copy=True)
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _change(was: list[Tensor], now: list[Tensor]) -> float:
    """The largest difference over the largest number; what is infinite or none must stay so."""
    pairs = list(zip(was, now, strict=True))
    same = [(x == y) | (x.isnan() & y.isnan()) for x, y in pairs]
    apart = [
        float((y - x).abs().masked_fill(equal, 0).max())
        for (x, y), equal in zip(pairs, same, strict=True)
    ]
    return max(apart) / (max(float(x[x.isfinite()].abs().max()) for x in was) or 1)


def loaded(network: Any, state: StateDict) -> nn.Module | None:
    """A copy of a module with another state; None of what is no module."""
    if not isinstance(network, nn.Module):
        return None
    module = copy.deepcopy(uncompiled(network))
    module.load_state_dict(dict(state), strict=False)
    return module
