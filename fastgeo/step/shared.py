"""Steps on a path that the ranks of a mesh share: each evaluates and updates its part of it."""

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgeo.data.inputs import Inputs, each_tensor
from fastgeo.data.outputs import IGNORED
from fastgeo.path import Path
from fastgeo.ranks.boundary import Boundary
from fastgeo.ranks.share import Share
from fastgeo.ranks.states import Layout, Rectangle
from fastgeo.step.agreement import check_agreement
from fastgeo.step.diagnose import all_finite, first_not_finite, where
from fastgeo.step.energy import EndLogits, cross_entropies, divergences
from fastgeo.step.engines import Engine
from fastgeo.step.nodes import Grid
from fastgeo.step.phases import phase
from fastgeo.step.step import Batch

if TYPE_CHECKING:
    from fastgeo.step.steps import Steps, Taken


class Shared:
    """The steps of this rank, at one number of points.

    Its engine is the one that is fastest for its own part, measured before the first step, since
    what was sent in a step cannot be sent again.

    Attributes:
        section: the points of this rank, as of `Share.section`, when the path was last copied.
    """

    section: Path
    _drawn: tuple[Inputs, Any]

    def __init__(self, steps: "Steps", share: Share):
        self.steps, self.share, self.step = steps, share, steps.step
        self._agreement = share.ranks.agreement
        self._ends = EndLogits(self.step.path, share.ends) if share.ends else None
        self._boundary: Boundary | None = None
        self._independent = share.ranks.data.size == 1  # whether inputs are known to be so
        self._of_edges = steps.descent.objective == "jsd"

    def take(self, rates: list[float]) -> "Taken | None":
        """As of `Steps.take`: one step, at the first of the rates."""
        from fastgeo.step.steps import Taken

        with self._agreement.step(self.steps.nodes.terms, self._give_up):
            with phase("data"):
                drawn = next(self.steps.order, None)
            if drawn is None:
                self._agreement.ready(None)
                return None
            self._drawn, grid = drawn, self.steps.nodes.draw()
            self.step.place(self._own_part(grid))
            batch = self._own_rows(self.steps.batch(*drawn, look=True))
            energies, gradient = self._looked_at(batch)
            unsound = not all_finite(gradient.values())
            length = self.share.length(self.section) if self.steps.measured else 0.0
            terms = self.share.terms(energies * batch.share, self.steps.nodes.terms)
            found = self._agreement.found(terms, length, unsound)
        energies = found.energies
        lengths = found.length[None] if self.steps.measured else None
        if not energies.isfinite().all():
            why = self._why_not_finite(energies, batch)
            return Taken(energies[None][:0], lengths, why, unsound=True)
        if found.unsound:
            name, i = self._first_not_finite(gradient, self.share.block.first)
            place = f"point {i + 1}, between edges {i} and {i + 1}"
            why = f"the gradient of {name} is not finite at {place}"
            return Taken(energies[None][:0], lengths, why)
        self.step.update(gradient, rates[0])
        return Taken(energies[None], lengths, counts=None if grid is None else grid.counts[None])

    def copied_path(self) -> Path:
        """This rank's section of the path, or the curve of few control points, in own memory."""
        path = self.step.copied_path()
        self.section = self.share.section(path)
        return self.section if path.free else path

    @torch.no_grad()
    def looked_at(self) -> "Taken":
        """What the last batch says of the path when it was last copied, with its length."""
        from fastgeo.step.steps import Taken

        count = len(self.share.outline) - self._of_edges
        rank = self.share.ranks.path.rank
        block = self.share.points.of[rank]
        with self._agreement.step(count, self._give_up):
            batch = self._own_rows(self.steps.batch(*self._drawn, look=True))
            terms = torch.zeros(count, dtype=torch.float64)
            if block.size and self._has_rows:
                own = self._divergences_or_losses(batch).double().cpu() * batch.share
                # Of the points next to its own, which it evaluates as well, only ends are counted.
                low = 0 if self._of_edges or block.first == 0 else 1
                high = len(own) - (rank != self.share.points.holding[-1])
                terms[block.first + low : block.first + high] = own[low:high]
            self._agreement.ready(self._drawn)
            found = self._agreement.found(terms, self.share.length(self.section), False)
        return Taken(found.energies[None], found.length[None])

    def not_finite(self) -> tuple[str, int] | None:
        """The first name and point, of those between the ends, with a weight that is not finite."""
        path = self.step.path
        bad = not all_finite(path.interior.values())
        if not self._agreement.any(bad):
            return None
        return self._first_not_finite(path.interior, self.share.held.first)

    def length(self) -> float:
        """Of the path when it was last copied."""
        return self._agreement.total(self.share.length(self.section))

    def callbacks(self) -> contextlib.AbstractContextManager:
        """As of `Steps.callbacks`."""
        return self._agreement.held()

    def held(self) -> tuple[Path, Layout, Rectangle]:
        """As of `fastgeo.ranks.states.Holder`."""
        rows, ranks = self.share.held, self.share.ranks
        groups: dict[str, dict[str, Tensor]] = {"weight": {}, "velocity": {}, "interior": {}}
        columns, side_by_side = [], []
        for number, (names, span, parts) in enumerate(self.step.columns()):
            side_by_side.append(names)
            columns.append(span)
            for kind, tensor in parts.items():
                groups[kind][str(number)] = tensor
        others = self.step.path.interior.keys() - self.step.trained.keys()
        if not ranks.data.rank and (self.share.split or not ranks.path.rank):
            groups["interior"] = {name: self.step.path.interior[name] for name in sorted(others)}
        controls = self.share.outline.basis.size - 2
        layout = Layout(controls, side_by_side, self.step.trained)
        return self.step.path, layout, Rectangle(rows, columns, groups if rows.size else {})

    # --- Parts ------------------------------------------------------------------------------------

    def _own_part(self, grid: Grid | None) -> Grid | None:
        """Of a grid of all networks."""
        if grid is None or self.share.split:
            return None
        first, last = self.share.block
        counts = grid.counts[first : last + self._of_edges]
        return Grid(grid.weights[first:last], counts, grid.back[:, first:last])

    def _own_rows(self, whole: Batch) -> Batch:
        """This data rank's part of a batch."""
        if self.share.ranks.data.size == 1:
            return whole
        rows, count = self.share.own_rows(whole.inputs)
        inputs = each_tensor(lambda t: t[rows] if t.ndim and len(t) == count else t, whole.inputs)
        counted = None if whole.counted is None else whole.counted[rows]
        labels = None if whole.labels is None else whole.labels[rows]
        share = (rows.stop - rows.start) / count
        counts = whole.counted
        if whole.labels is not None:
            counts = whole.labels.long() != IGNORED
            counts = counts if whole.counted is None else counts & whole.counted
        if counts is not None:
            share = int(counts[rows].sum()) / max(1, int(counts.sum()))
        return Batch(inputs, counted, labels, share)

    @property
    def _has_rows(self) -> bool:
        """Whether this data rank has any of the batch; there may be more ranks than rows."""
        rows, _ = self.share.own_rows(self._drawn[0])
        return rows.stop > rows.start

    # --- A step -----------------------------------------------------------------------------------

    def _looked_at(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Energies of this rank's edges or networks, and the gradient to its networks."""
        ready = partial(self._agreement.ready, self._drawn)
        nothing = torch.zeros(0), self.step.no_gradient()
        evaluates = bool(self.share.block.size or (self._of_edges and self.share.ends))
        if not evaluates or not self._has_rows:
            ready()
            return nothing
        engine = self._engine(batch)
        if batch.labels is not None:
            found = self.step.loss_gradient(engine, batch, check=True)
            ready()
            return found
        ends: dict[int, Tensor] = {}
        if self._ends is not None:
            logits = self._ends(self._drawn[0], batch.inputs, engine)
            ends = dict(zip(self.share.ends, logits.of().split(1), strict=True))
        self._boundary = self.share.boundary(ends, ready)
        found = nothing
        if self.share.block.size:
            found = self.step.gradient(engine, batch, self._boundary)
        self._boundary.finish()
        return found

    def _give_up(self) -> None:
        if self._boundary is not None:
            self._boundary.give_up()

    def _engine(self, batch: Batch) -> Engine:
        """The one that is chosen, by steps of this rank alone, between the two ends."""
        steps, given = self.steps, self._drawn[0]
        self._boundary = None
        steps.prepare(batch.inputs)
        both = EndLogits(self.step.path)

        def alone(engine: Engine) -> None:
            if batch.labels is not None:
                self.step.loss_gradient(engine, batch, check=True)
            elif self.share.block.size:
                self.step.gradient(engine, batch, both(given, batch.inputs, engine))
            else:
                both(given, batch.inputs, engine)

        while steps.choice.chosen is None:
            steps.choice.run(alone)
        if not self._independent:
            self._refuse_coupled(steps.choice.chosen, batch)
            self._independent = True
        return steps.choice.chosen

    @torch.no_grad()
    def _refuse_coupled(self, engine: Engine, batch: Batch) -> None:
        """ValueError if an input's outputs depend on which others are in the batch."""
        whole = self.steps.batch(*self._drawn, look=True).inputs
        rows, count = self.share.own_rows(whole)
        one = {name: tensor[None] for name, tensor in self.step.path.start.items()}
        outputs, expected = engine.network(one, batch.inputs), engine.network(one, whole)
        try:
            check_agreement((outputs, {}), (expected[:, rows], {}))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "what the module returns of an input depends on the others of its batch, so that "
                "data ranks cannot share a batch; give a mesh with one data rank"
            ) from error

    def _divergences_or_losses(self, batch: Batch) -> Tensor:
        """[K + 1] or [K + 2] nats of the section."""
        engine = self._engine(batch)
        logits = engine.logits(self.section.stacked(), batch.inputs)
        if batch.labels is not None:
            return cross_entropies(logits, batch.labels, batch.counted)
        weight = None if batch.counted is None else batch.counted.flatten().to(logits.device)
        return divergences(logits, weight)

    # --- What is not finite -----------------------------------------------------------------------

    def _first_not_finite(self, rows: dict[str, Tensor], first: int) -> tuple[str, int]:
        """The first name of all ranks' rows with a number that is not finite, and which row."""
        own = None if all_finite(rows.values()) else first_not_finite(rows)
        found = [] if own is None else [(list(rows).index(own[0]), own[1] + first, own[0])]
        _, i, name = min(one for part in self._agreement.objects(found) for one in part)
        return name, i

    def _why_not_finite(self, energies: Tensor, batch: Batch) -> str:
        """In words: the first edge that has no finite divergence, and the layer where it begins."""
        first = int((~energies.isfinite()).nonzero()[0])
        points = (first, first + 1) if self._of_edges else (first + 1,)
        own = {p: self._where(p, batch) for p in points if self._has(p)}
        reasons = self._agreement.objects(own)
        point, reason = _first_conclusive(points, reasons)
        return f"{self.steps.first_bad(energies)}, since at point {point} {reason}"

    def _has(self, point: int) -> bool:
        """Whether this rank evaluates a network, counted with the start."""
        if point in (0, self.share.networks + 1):
            return self.share.ranks.path.rank == 0
        return self.share.block.first < point <= self.share.block.last

    def _where(self, point: int, batch: Batch) -> str:
        if point == 0:
            state = self.step.evaluated.start
        elif point > self.share.networks:
            state = self.step.evaluated.end
        else:
            state = self.step.evaluated._point(point - self.share.block.first)
        return where(self.steps.module, state, batch.inputs)


def _first_conclusive(points: Sequence[int], reasons: list[dict[int, str]]) -> tuple[int, str]:
    """The first of the points that says where numbers stop being finite, else the last one."""
    found = [(p, known[p]) for p in points for known in reasons if p in known]
    conclusive = [one for one in found if "every layer" not in one[1]]
    return (conclusive or found[-1:])[0]
