"""What every network on a path computes of its data while it is trained, computed anew."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.data.inputs import Inputs, Passes, each_tensor, on_device
from fastgeo.forward.modes import (
    Statistics,
    after_training,
    in_training,
    plain_averages,
    statistics,
)
from fastgeo.forward.options import Forward
from fastgeo.path import Path, check_buffers, check_path_of
from fastgeo.stacking.module import stack
from fastgeo.step.engines import Engine

FAR = 2.0**10  # from which a moving average is seen to return
SETTLED = 200  # passes, at most, until what the weights alone determine stays as it is


@torch.no_grad()
def recalibrate(
    path: Path,
    module: nn.Module,
    batches: Iterable,
    *,
    forward: Forward = Forward(),
    progress: bool = False,
) -> Path:
    """The same path with the statistics of every network, ends included, from data.

    A network between two others has features of its own, whose means and variances are not between
    theirs: with interpolated statistics it would be worse than it is. What a network updates by
    itself in train mode is found by one pass over the first batch, whatever it is called, and
    computed anew with the dropout off. Weights do not change.

    * Every moving average, of BatchNorm or of a layer like it, becomes the plain average over the
      batches, as with `torch.optim.swa_utils.update_bn` for each network and in the curve finding
      of Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs" (2018).
    * Counts and sums, of batches or inputs, start at 0.
    * What depends on the weights alone, as the vectors of spectral norm do, is updated until it
      stays as it is.
    * Anything else is updated over the batches in turn, from where it is.

    A batch of one input after larger ones is left out, since it has no variance.

    Args:
        path: made with `Path.linear(..., batchnorm="recalibrate")`.
        module: the network of all points.
        batches: one pass over inputs, as in `fastgeo.optimize`; training data, usually.
        forward: of which chunk and output matter here.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: as in `fastgeo.optimize`; a module that updates nothing, or no batch.

    Example:
        >>> path = optimize(path, module, batches, forward=Forward(batchnorm="recalibrate"))
        >>> path = recalibrate(path, module, batches)
    """
    module = check_path_of(path, module)
    order = Passes(batches, repeat=False, alone=False)
    first = order.peek()
    if first is None:
        raise ValueError("batches must hold at least one batch of inputs")
    inputs = on_device(first[0], path.device)
    found = statistics(module, path.start, inputs)
    names = [name for name in path.start if name in found.names]
    check_buffers(path.start, path.end, module, interpolated=path.interpolated, updated=names)
    path = path.freed()  # what is computed for each point is on no curve of few control points
    updates, stacked = _Updates(path, module, found, forward), path.stacked()
    kinds = _Kinds.of(module, path.start, inputs, found)
    for name in kinds.kept.keys() - path.start.keys():
        raise ValueError(
            f"{name} is a moving average that is in no state dict (persistent=False), so that a "
            "path cannot hold it"
        )
    values = {name: kinds.beginning(name, stacked[name], path.start[name]) for name in names}
    updates.settle(values, kinds.free & values.keys(), inputs)
    totals = {name: values[name].to(torch.float64, copy=True) for name in kinds.kept}
    totals |= {name: values[name].clone() for name in kinds.counts & values.keys()}
    seen = 0
    for given, _ in tqdm(order, desc="recalibrate", unit="batch", disable=not progress):
        after = updates(values, on_device(given, path.device))
        for name, total in totals.items():  # to which every batch adds what it gives by itself
            value = after.pop(name)
            total += value.double() / (1 - kinds.kept[name]) if name in kinds.kept else value
        values |= after
        seen += 1
    for name, total in totals.items():
        values[name] = total if name in kinds.counts else (total / seen).to(values[name])
    start, interior, end = dict(path.start), dict(path.interior), dict(path.end)
    for name in names:
        start[name], *between, end[name] = values[name].unbind(0)
        if name in interior:
            interior[name] = values[name][1:-1].contiguous()
        elif not all(torch.equal(own, start[name]) for own in between):
            raise ValueError(
                f"{name} is an integer buffer in which the networks of a path come to differ; a "
                "path holds one value of it"
            )
    return Path(start, interior, end, path.interpolated)


@torch.no_grad()
def settled(
    path: Path, module: nn.Module, inputs: Inputs, found: Statistics, forward: Forward
) -> Path:
    """The path whose points between the ends have what depends on their weights alone, as the
    vectors of spectral norm do, computed from these."""
    free = _free(module, path.start, inputs, found) & path.interior.keys()
    if not free:
        return path
    free &= _Kinds.of(module, path.start, inputs, found).free
    controls = Path(path.start, path.interior, path.end, path.interpolated)
    stacked = controls.stacked()
    values = {name: path.start[name].expand_as(stacked[name]).clone() for name in sorted(free)}
    _Updates(controls, module, found, forward).settle(values, free, inputs)
    return path.with_interior(
        path.interior | {name: tensor[1:-1].clone() for name, tensor in values.items()}
    )


class _Updates:
    """Passes in train mode over all points of a path, whose weights stay as they are."""

    def __init__(self, path: Path, module: nn.Module, found: Statistics, forward: Forward):
        self.stacked, self.module, self.found = path.stacked(), module, found
        network = stack(module, batchnorm="recalibrate", output=forward.output)
        self.engine = Engine(network, forward.chunk)

    def __call__(self, values: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
        """Statistics [N, ...] after one pass that begins with these values of them."""
        own = {name: self.stacked[name] for name in self.found.names & self.stacked.keys()}
        given = {name: tensor.clone() for name, tensor in (own | dict(values)).items()}
        with in_training(self.module, self.found.layers), plain_averages(self.module):
            self.engine.forward(self.stacked | given, inputs)
        return {name: given[name] for name in values}

    def settle(self, values: dict[str, Tensor], free: Collection[str], inputs: Inputs) -> None:
        """Update some of the values until they change no more, up to half of their digits."""
        for _ in range(SETTLED if free else 0):
            after = self(values, inputs)
            change = {name: (after[name] - values[name]).abs().max().item() for name in free}
            values |= {name: after[name] for name in free}
            if all(change[name] <= torch.finfo(values[name].dtype).eps ** 0.5 for name in free):
                break


@dataclass(frozen=True)
class _Kinds:
    """How the statistics of a network follow from data.

    Attributes:
        kept: moving averages -> which share of the old value an update keeps.
        counts: names of what every batch is added to.
        free: names of what depends on weights alone.
    """

    kept: dict[str, float]
    counts: frozenset[str]
    free: frozenset[str]

    @classmethod
    def of(
        cls, module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs, found: Statistics
    ) -> "_Kinds":
        """As seen on one network: layer by layer, from other values of what it updates.

        Averages of which the same layer makes something else, as a codebook does, stay with that.
        """

        def after(**changed: Tensor) -> dict[str, Tensor]:
            return after_training(module, {**state, **changed}, inputs, found)

        kept: dict[str, float] = {}
        counts: set[str] = set()
        own = dict(module.named_buffers(remove_duplicate=False))
        as_it_is = after()
        for layer in sorted({name.rpartition(".")[0] for name in found.names}):
            names = [name for name in found.names if name.rpartition(".")[0] == layer]
            whole = {n: state.get(n, own[n]) for n in names}
            floats = [name for name in names if whole[name].is_floating_point()]
            zero = {n: torch.zeros_like(t) for n, t in whole.items() if t.dtype != torch.bool}

            def at(value: float, zero=zero, floats=floats) -> dict[str, Tensor]:
                moved = {name: torch.full_like(zero[name], value) for name in floats}
                return after(**{**zero, **moved})

            from_zero, from_one, low, high = at(0.0), at(1.0), at(-FAR), at(FAR)
            shares: dict[str, float] = {}
            for name in names:
                if name in floats:
                    share = _share_kept(*(a[name] for a in (low, from_zero, from_one, high)))
                    shares |= {} if share is None else {name: share}
                elif name in zero and torch.equal(from_zero[name], as_it_is[name] - whole[name]):
                    shares[name] = 1.0
            moved = after(**{n: whole[n] + (FAR if n in floats else 1) for n in shares})
            if all(torch.equal(moved[n], as_it_is[n]) for n in names if n not in shares):
                counts |= {name for name, share in shares.items() if share == 1}
                kept |= {name: share for name, share in shares.items() if share < 1}
        others = found.names - kept.keys() - counts
        free = _free(module, state, inputs, found) if others else frozenset()
        return cls(kept, frozenset(counts), free & others)

    def beginning(self, name: str, values: Tensor, start: Tensor) -> Tensor:
        """[N, ...] before the first batch, in memory of its own."""
        if name in self.kept or name in self.counts:
            return torch.zeros_like(values, memory_format=torch.contiguous_format)
        if name in self.free:  # of the start: vectors of any sign may cancel between the ends
            values = start.expand_as(values)
        return values.clone(memory_format=torch.contiguous_format)


def _free(
    module: nn.Module, state: Mapping[str, Tensor], inputs: Inputs, found: Statistics
) -> frozenset[str]:
    """Names of the floating point statistics that come out alike for other inputs, wherever they
    begin: a largest value that was seen may be larger than all there is."""
    nothing = each_tensor(torch.zeros_like, inputs)
    own = dict(module.named_buffers(remove_duplicate=False))
    names = {name for name in found.names if own[name].is_floating_point()}
    for value in (-FAR, FAR):
        moved = {name: torch.full_like(state.get(name, own[name]), value) for name in names}
        some, others = (
            after_training(module, {**state, **moved}, given, found) for given in (inputs, nothing)
        )
        names = {name for name in names if torch.equal(some[name], others[name])}
    return frozenset(names)


def _share_kept(low: Tensor, zero: Tensor, one: Tensor, high: Tensor) -> float | None:
    """Which share of its old value a moving average keeps, and a count 1; None if it is neither.

    Args:
        low, zero, one, high: after an update from -FAR, 0, 1 and FAR in all places.
    """
    eps = torch.finfo(zero.dtype).eps
    low, zero, one, high = (tensor.double() for tensor in (low, zero, one, high))
    if not zero.numel():
        return None
    share = max(0.0, ((high - low) / (2 * FAR)).median().item())
    rounding = 16 * eps * (zero.abs() + FAR)
    affine = all(
        ((given - (zero + share * value)).abs() <= rounding).all()
        for value, given in ((-FAR, low), (FAR, high))
    )
    close = ((one - (zero + share)).abs() <= 16 * eps * (zero.abs() + 1)).all()
    if not affine or not close:
        return None
    return 1.0 if share > 1 - 64 * eps else share
