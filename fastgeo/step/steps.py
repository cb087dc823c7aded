"""Steps over a stream of batches: one by one, or on a GPU many that the host does not look at."""

import contextlib
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastgeo.data.inputs import Inputs, Passes, on_device
from fastgeo.data.outputs import rows_that_count
from fastgeo.forward.options import Forward
from fastgeo.path import Path
from fastgeo.step.capture import (
    AT_ONCE,
    NotCaptured,
    Replay,
    captured_forward,
    captures,
    check_capturable,
    plans_measured,
)
from fastgeo.step.descent import Descent
from fastgeo.step.diagnose import all_finite, first_not_finite, where
from fastgeo.step.energy import EndLogits, cross_entropies, divergences
from fastgeo.step.engines import Engine, EngineChoice
from fastgeo.step.memory import path_work
from fastgeo.step.nodes import Grid, Nodes
from fastgeo.step.phases import phase
from fastgeo.step.step import Batch, Step, resampled

if TYPE_CHECKING:  # what one process needs not
    from fastgeo.ranks.share import Share
    from fastgeo.ranks.states import Layout, Rectangle
    from fastgeo.step.shared import Shared


class Taken(NamedTuple):
    """What some steps found, those before one that is not finite if there is one.

    Attributes:
        energies: [K, E] nats, of each edge before each step, or [K, T] of each network where the
            objective is the cross-entropy.
        lengths: [K], Σ‖Δθ‖ of the path before each step; None if it is not measured.
        why: what stopped them, in words; empty if nothing did.
        unsound: whether the path before the first of them has no finite energy.
        counts: as energies, what each of them counts in the objective; None where all are alike.
    """

    energies: Tensor
    lengths: Tensor | None
    why: str = ""
    unsound: bool = False
    counts: Tensor | None = None


class Steps:
    """The steps of an optimisation, at one number of points after the other.

    Args:
        module: the network of all points, in the mode that it is to be evaluated in.
        order: the batches.
        capture: whether steps are captured; None for where nothing forbids it, on a GPU.
        most: networks between the ends in a step of the finest path to come.
        measured: whether the path's length Σ‖Δθ‖ is. One by one, and where `Step.measure` says no,
            that takes a pass over all weights; captured, the update has them at hand.
        on_choice: as of `fastgeo.optimize`.

    Attributes:
        step: of the path as it is now; `begin` makes it.
        path_like: a path of as many points and control points, likewise.
        nodes: where its networks are, likewise.
        shared: the steps of this rank of a mesh; None in one process.
        generator: draws those that are random.
    """

    step: Step
    path_like: Path
    nodes: Nodes

    def __init__(
        self,
        module: nn.Module,
        order: Passes,
        descent: Descent,
        forward: Forward,
        *,
        capture: bool | None,
        device: torch.device,
        most: int,
        measured: bool = False,
        on_choice: Callable[[dict], None] | None,
    ):
        self.module, self.order, self.descent, self.forward = module, order, descent, forward
        self.most, self.measured = most, measured
        self._on_choice, self._device = on_choice, device
        self._ends: EndLogits | None = None
        self._last: Batch | None = None
        self.generator = torch.Generator().manual_seed(torch.initial_seed())
        self._must, self._captures = bool(capture), captures(capture, forward, device)
        self.choice = self._new_choice()
        self.shared: Shared | None = None

    @property
    def at_once(self) -> int:
        """How many steps are read together, at most."""
        return AT_ONCE if self._captures else 1

    def begin(
        self, path: Path, velocity: Mapping[str, Tensor], share: "Share | None" = None
    ) -> None:
        """Go on with this path, or with what a rank holds of it."""
        self.choice.next_level()
        innermost = self._captures and bool(self.choice.forward.channels_last)
        self.step = Step(
            path, self.module, self.descent, velocity, channels_last=innermost, share=share
        )
        self.path_like = path if share is None else share.outline
        self.nodes = Nodes(self.path_like, self.descent, self.generator)
        self._way = self._captured() if self._captures else self._one_by_one
        if share is not None:
            from fastgeo.step.shared import Shared

            self.shared = Shared(self, share)
            self._way = self.shared.take

    @property
    def points(self) -> int:
        """N."""
        return len(self.path_like)

    @property
    def controls(self) -> int:
        """Control points of the path, with both ends."""
        return self.path_like.basis.size

    def length(self) -> float:
        """Of the path as it is now."""
        if self.shared is None:
            return self.step.path.euclidean().sum().item()
        self.shared.copied_path()
        return self.shared.length()

    def callbacks(self) -> contextlib.AbstractContextManager:
        """In which functions of the caller's are called."""
        return contextlib.nullcontext() if self.shared is None else self.shared.callbacks()

    def refine(self, size: int) -> None:
        """Go on with the same curve of so many control points."""
        if size == self.controls:
            return
        path, velocity = self.step.copied_path(), self.step.velocity()
        if self.shared is None:
            path = path.refined(size)
            self.begin(path, resampled(velocity, path))
            return
        share, to = self.shared.share, self.shared.share.resized(size)
        zero = {name: torch.zeros_like(path.start[name]) for name in velocity}
        moved = share.moved(path.interior, (path.start, path.end), to)
        velocity = share.moved(velocity, (zero, zero), to) if velocity else {}
        self.begin(to.outline.with_interior(moved), velocity, to)

    def copied_path(self) -> Path:
        """The path as it is now, or this rank's section of it, in memory of its own."""
        return self.step.copied_path() if self.shared is None else self.shared.copied_path()

    def looked_at(self, path: Path) -> Taken:
        """What the last batch says of the path as it is now, with its length.

        Args:
            path: as it was copied.
        """
        if self.shared is not None:
            return self.shared.looked_at()
        return Taken(self.energies()[None], path.euclidean().sum()[None])

    def held(self) -> "tuple[Path, Layout, Rectangle]":
        """As of `fastgeo.ranks.states.Holder`."""
        assert self.shared is not None
        return self.shared.held()

    def not_finite(self, path: Path) -> tuple[str, int] | None:
        """The first name and point, of those between the ends, with a weight that is not finite."""
        if self.shared is not None:
            return self.shared.not_finite()
        return None if all_finite(path.interior.values()) else first_not_finite(path.interior)

    def take(self, rates: list[float]) -> Taken | None:
        """Steps at these rates, fewer where batches end; None where there is no batch.

        Raises:
            NotCaptured: they have to be captured, and cannot.
        """
        try:
            return self._way(rates)
        except NotCaptured:
            if self._must:
                raise
        self._captures = False
        self.choice, path, velocity = self._new_choice(), self.step.path, self.step.velocity()
        self.begin(path, velocity)
        return self._way(rates[:1])

    @torch.no_grad()
    def energies(self) -> Tensor:
        """[E] or [N] nats, of the points of the path as it is now on the last batch."""
        assert self._last is not None and self.choice.chosen is not None
        inputs, counted, labels, _ = self._last
        logits = self.choice.chosen.logits(self.step.path.stacked(), inputs)
        if labels is not None:
            return cross_entropies(logits, labels, counted)
        weight = None if counted is None else counted.flatten().to(self.step.path.device)
        return divergences(logits, weight)

    def batch(self, given: Inputs, targets: Any, *, look: bool) -> Batch:
        """What was drawn, on the device; of targets, if no labels are needed, where they count."""
        device = self._device
        inputs = on_device(given, device)
        counted = rows_that_count(inputs, targets, self.forward.mask, look=look)
        counted = counted if look or counted is None else counted.to(device)
        if self.descent.objective == "jsd":
            return Batch(inputs, counted)
        if not isinstance(targets, Tensor):
            raise ValueError(
                "the cross-entropy needs batches (inputs, labels) with labels in a tensor, got "
                f"{type(targets).__name__} beside the inputs"
            )
        return Batch(inputs, counted, targets.to(device))

    def _new_choice(self) -> EngineChoice:
        forward = self.forward
        if self._captures:
            forward = captured_forward(forward, self._device)
        work = path_work(self.descent.momentum)
        return EngineChoice(self.module, forward, work=work, on_choice=self._on_choice)

    def prepare(self, inputs: Inputs) -> None:
        """Line up the engines, or choose the one there is."""
        if self.choice.chosen is None:
            one = {name: tensor[None] for name, tensor in self.step.path.start.items()}
            points = self.nodes.count
            if self.shared is not None:
                points = max(1, self.shared.share.block.size)
            self.choice.prepare(one, inputs, points=points, most=self.most)

    def _one_by_one(self, rates: list[float]) -> Taken | None:
        """A step at the first of the rates, which is looked at before the path is moved by it."""
        with phase("data"):
            drawn = next(self.order, None)
        if drawn is None:
            return None
        given, path, grid = drawn[0], self.step.path, self.nodes.draw()
        batch = self._last = self.batch(*drawn, look=True)
        self.step.place(grid)
        self.prepare(batch.inputs)
        ends = self._ends = self._ends or EndLogits(path)  # of every number of points

        def look(engine: Engine) -> tuple[Tensor, dict[str, Tensor]]:
            if batch.labels is not None:
                return self.step.loss_gradient(engine, batch, check=True)
            return self.step.gradient(engine, batch, ends(given, batch.inputs, engine))

        energies, gradient = self.choice.run(look)
        lengths = path.euclidean().sum()[None] if self.measured else None
        if not energies.isfinite().all():
            why = self._why_not_finite(energies, batch.inputs)
            return Taken(energies[None][:0], lengths, why, unsound=True)
        if not all_finite(gradient.values()):
            name, i = first_not_finite(gradient)
            place = f"point {i + 1}, between edges {i} and {i + 1}"
            why = f"the gradient of {name} is not finite at {place}"
            return Taken(energies[None][:0], lengths, why)
        self.step.update(gradient, rates[0])
        return Taken(energies[None], lengths, counts=None if grid is None else grid.counts[None])

    def _why_not_finite(self, energies: Tensor, inputs: Inputs) -> str:
        """In words: the first edge that has no finite divergence, and the layer where it begins."""
        first = int((~energies.isfinite()).nonzero()[0])
        of_edges = self.descent.objective == "jsd"
        for point in (first, first + 1) if of_edges else (first + 1,):
            reason = where(self.module, self.step.evaluated._point(point), inputs)
            if "every layer" not in reason:
                break
        return f"{self.first_bad(energies)}, since at point {point} {reason}"

    def first_bad(self, energies: Tensor) -> str:
        """In words, the first of a step's that is not finite."""
        first = int((~energies.isfinite()).nonzero()[0])
        if self.descent.objective == "jsd":
            return f"the divergence of edge {first} is {energies[first].item()}"
        return f"the cross-entropy of point {first + 1} is {energies[first].item()}"

    def _captured(self) -> Callable[[list[float]], Taken | None]:
        return _Captured(self).take


class _Captured:
    """Steps that a GPU replays from a CUDA graph, and that the host reads many at a time.

    What makes a step different from the next lies on the device at fixed places: the batch, the
    rate, the grid, the number of the step, the energies.
    """

    def __init__(self, steps: Steps):
        self.steps, self.step = steps, steps.step
        path = self.step.path
        precise = torch.promote_types(next(iter(path.interior.values())).dtype, torch.float32)
        self._rates = torch.zeros(AT_ONCE, dtype=precise, device=path.device)
        self._turn = torch.zeros(1, dtype=torch.long, device=path.device)
        self._energies = self._rates.new_zeros(AT_ONCE, steps.nodes.terms)
        self._lengths = torch.zeros_like(self._rates)
        self._passes_over = steps.measured and not self.step.measure()
        self._ends: dict[str, Tensor] = {}
        self._grid: Grid | None = None
        self.replay: Replay[None] | None = None

    def take(self, rates: list[float]) -> Taken | None:
        self._rates[: len(rates)].copy_(torch.tensor(rates, dtype=self._rates.dtype))
        self._turn.zero_()
        grids = [grid for _ in rates if (grid := self.steps.nodes.draw()) is not None]
        if grids and self._grid is None:
            self._grid = Grid(*map(torch.clone, grids[0]))
            self.step.place(self._grid)
        taken = 0
        for drawn in islice(self.steps.order, len(rates)):
            batch = self.steps.batch(*drawn, look=False)
            if self.replay is None:
                try:
                    with plans_measured():
                        self._begin(batch)
                except NotCaptured:
                    self.steps.order.put_back(drawn)
                    raise
            assert self.replay is not None
            if self._grid is not None:
                torch._foreach_copy_(list(self._grid), list(grids[taken]))
            self.replay(batch)
            self.steps._last = batch
            taken += 1
        if not taken:
            return None
        energies = self._energies[:taken].cpu()  # here the host waits
        lengths = self._lengths[:taken].cpu() if self.steps.measured else None
        counts = torch.stack([grid.counts for grid in grids[:taken]]).cpu() if grids else None
        bad = (~energies.isfinite()).any(1).nonzero()
        if not len(bad):
            return Taken(energies, lengths, counts=counts)
        good = int(bad[0])
        why = self.steps.first_bad(energies[good])
        counts = None if counts is None else counts[:good]
        return Taken(energies[:good], lengths, why, unsound=good == 0, counts=counts)

    def _begin(self, batch: Batch) -> None:
        """Choose the engine, and make what replays the step of a batch like this."""
        path = self.step.path
        try:
            self.steps.prepare(batch.inputs)
        except ValueError as error:
            raise NotCaptured(str(error)) from error
        network = self._engine().network
        check_capturable(network)
        if network.precision == "bf16":
            self.step.keep_half(network.parameters_in_half())
        evaluated = self.step.evaluated.interior
        self._ends = {
            name: torch.stack([t, path.end[name]]).to(evaluated.get(name, t).dtype)
            for name, t in path.start.items()
        }
        self.replay = Replay(self._run, path.device, [*self.step.memory(), self._turn])

    def _engine(self) -> Engine:
        assert self.steps.choice.chosen is not None  # it was named, so it is known at once
        return self.steps.choice.chosen

    def _run(self, batch: Batch) -> None:
        """One step, operation by operation; nothing waits for the device."""
        engine = self._engine()
        self.step.place(self._grid)
        edges = self.step.path.euclidean() if self._passes_over else None
        if batch.labels is not None:
            energies, gradient = self.step.loss_gradient(engine, batch, check=False)
        else:
            with torch.no_grad():
                ends = Engine(engine.network).logits(self._ends, batch.inputs)
            energies, gradient = self.step.gradient(engine, batch, ends)
        before = self.step.update(gradient, self._rates.index_select(0, self._turn)[0])
        edges = edges if before is None else before
        if edges is not None:
            self._lengths.index_copy_(0, self._turn, edges.sum()[None].to(self._lengths))
        self._energies.index_copy_(0, self._turn, energies[None].to(self._energies))
        self._turn += 1
