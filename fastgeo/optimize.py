"""Optimisation of a path: SGD on its energy, the sum of its neighbours' divergences, or its loss.

Near a solution the energy's Hessian is (Fisher metric) x L / 4 with L = tridiag(-1, 2, -1) along
the path, so its smoothest mode relaxes about (2 (N - 1) / pi)^2 times slower than its roughest.
Multiplying the stacked gradient by the inverse of L, the gradient in the H1 inner product of paths,
removes that factor at the same optimum and learning rate. `fastgeo.step.nodes` has the same of
curves of few control points.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Sized
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.basis import Basis
from fastgeo.data.inputs import Passes, on_device
from fastgeo.forward.modes import batch_statistics, evaluation_mode, statistics
from fastgeo.forward.options import Forward
from fastgeo.path import Path, check_buffers, check_path_of
from fastgeo.recalibrate import settled
from fastgeo.stacking.precision import matmul_precision
from fastgeo.step.capture import not_measured, paced
from fastgeo.step.descent import Descent
from fastgeo.step.steps import Steps, Taken
from fastgeo.store.checkpoint import Checkpoints, Groups, State

if TYPE_CHECKING:  # what one process needs not
    from torch.distributed.device_mesh import DeviceMesh

    from fastgeo.ranks.mesh import Ranks
    from fastgeo.ranks.share import Share
    from fastgeo.ranks.states import RankStates, Stored

FEW = 10  # steps, of which nothing is concluded
FALLEN = 0.99  # of the energy, if it fell


@torch.inference_mode(False)
def optimize(
    path: Path,
    module: nn.Module,
    batches: Iterable,
    *,
    steps: int | None = None,
    descent: Descent = Descent(),
    forward: Forward = Forward(),
    cuda_graph: bool | None = None,
    on_choice: Callable[[dict], None] | None = None,
    on_step: Callable[[dict, Path], None] | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = False,
    mesh: "DeviceMesh | None" = None,
) -> Path:
    """Move the control points of a path towards the geodesic between its ends, or to a low loss.

    Args:
        path: where to start; not changed.
        module: the network of all points, run in eval mode; its parameter values are not used.
        batches: iterable of inputs, or of tuples that begin with inputs and targets. Inputs are a
            tensor [B, ...], or any mapping that holds one, such as a tokenizer's: the keyword
            arguments of the module's forward. Labels in it are dropped unread (a language model
            shifts them, so they do not belong to the rows of its logits), and caches are off. Of
            targets it matters only where they are -100: that row of the logits does not count. For
            the cross-entropy they are classes, as in `fastgeo.evaluate`. Gone through again, if
            it can be, until all steps are done. On statistics of the batch one of a single input is
            left out that comes after larger ones.
        steps: how many; one pass over the batches by default.
        descent: rate, momentum and the like (`fastgeo.Descent`).
        forward: engine, chunk, precision and the like (`fastgeo.Forward`). The energy is the mean
            over the rows that count, and 0 on a batch without any.
        cuda_graph: whether a step is captured in a CUDA graph, once for each number of points, and
            replayed, the energies of 50 steps being read together; by default on a GPU where
            nothing forbids it. The engine is "stacked" then, and the memory format of images by
            default channels-last on a GPU. Elsewhere the same steps are done one operation after
            the other.
        on_choice: called once for each number of points with {"engine", "channels_last", "chunk",
            "precision", "points": interior ones, "seconds": measured a step of each candidate,
            "failed": why others were left out} when the engine is known.
        on_step: called for every step with {"step", "energy": nats, "sqrt_jsd", "euclidean",
            "points": N} on its batch, with "cross_entropy" in nats instead of energy and sqrt_jsd
            if that is the objective, and a path which may be kept: the one that has them, or, if
            steps are captured, the one at the first of those that are read together.
        checkpoints: where to save the state now and then, and to go on from if there is one: on a
            CPU, to the same result to the last bit. Batches before it are drawn again and left
            aside; random numbers in them must be torch's.
        progress: show a progress bar.
        mesh: of dimensions ("path", "data") under an initialised process group, all of whose ranks
            call this alike, with the same path, batches and settings. Ranks along "path" hold
            consecutive points each, on the device of the mesh, and those along "data" take
            consecutive rows of every batch. The result is that of one process up to rounding; with
            an engine that is named it repeats itself on a mesh to the last bit. An error of one
            rank is raised on all.

    Returns:
        A new path with the same ends, and with `history` (`fastgeo.Path`) of this call's steps. On
        a mesh, this and what on_step is given is the section of this rank: its own points between
        those beside them, of which `fastgeo.ranks.gather.gather` makes the whole; or the curve, if
        that has control points of its own.

    Warns:
        UserWarning: the energy did not fall; at random nodes that is not looked at.

    Raises:
        TypeError: a path, module or batches of another type, or no logits in what the module
            returns.
        ValueError: a path that is not of this module, a mask or targets with -100 whose shape is
            not that of the logits, no labels where the objective needs them, no parameter to train,
            too few batches, no number of steps where the descent needs one, an energy or gradient
            that stops being finite, checkpoints of another path, cuda_graph=True for a step that
            cannot be captured, or what differs between the ranks of a mesh.
        RuntimeError: another rank of the mesh stopped; with its sentence.

    Example:
        >>> path = Path.linear(a, b, 25)
        >>> path = optimize(path, module, [inputs], steps=100)
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    module, recalibrated = check_path_of(path, module), forward.batchnorm == "recalibrate"
    path = _outside_of_inference(path)
    order = Passes(batches, repeat=steps is not None, alone=not recalibrated)
    if steps is None and descent.needs_steps:
        if not isinstance(batches, Sized):
            raise ValueError(
                "give steps, how many: batches have no length, and lr_schedule "
                f"{descent.lr_schedule!r} or coarse_to_fine depend on it"
            )
        steps = len(batches) or 1
    sizes = descent.levels(path.basis, steps)
    most = descent.nodes or len(path) - 2
    taken = 0
    history: list[dict] = []
    velocity: dict[str, Tensor] = {}
    state: Groups = {}
    watched = checkpoints is not None or on_step is not None
    ranks, share, states = None, None, None
    if mesh is not None:
        from fastgeo.ranks.alike import alike
        from fastgeo.ranks.share import Share
        from fastgeo.ranks.states import RankStates

        given = dict(steps=steps, descent=descent, forward=forward, cuda_graph=cuda_graph)
        ranks, watched = alike(mesh, path, given, checkpoints is not None, watched)
        forward = not_measured(forward, ranks.device)  # or ranks might take different ones
        share = Share.of(ranks, path, descent.nodes)
        most = -(-most // ranks.path.size)
        states = None if checkpoints is None else RankStates(checkpoints, ranks)
    saved = _saved(checkpoints, states)
    if saved is not None:
        path, velocity, share = _restored(path, *saved, sizes, descent, ranks)
        taken, state = saved[0].step, saved[0].tensors["state"]
        order.load_state_dict(state["order"])
        saved[0].set_generators()
    elif share is not None:
        path = share.part(path)
    mode, updated = evaluation_mode(module), frozenset[str]()
    if recalibrated and (first := order.peek()) is not None:
        inputs = on_device(first[0], path.device)
        own = statistics(module, path.start, inputs)
        mode, updated = batch_statistics(module, own), own.names
        path = settled(path, module, inputs, own, forward) if saved is None else path
    moving = Steps(
        module,
        order,
        descent,
        forward,
        capture=cuda_graph if ranks is None else False,
        device=path.device,
        most=most,
        measured=watched,
        on_choice=on_choice,
    )
    check_buffers(path.start, path.end, module, interpolated=path.interpolated, updated=updated)
    if ranks is not None:
        generators = ranks.agreement.objects(moving.generator.get_state())
        moving.generator.set_state(generators[0])
    if "nodes" in state:
        moving.generator.set_state(state["nodes"]["generator"])

    def reached() -> None:
        """The state is that before a step."""
        now = {"order": order.state_dict()}
        if states is None:
            now["velocity"] = moving.step.velocity()
        if descent.nodes is not None:
            now["nodes"] = {"generator": moving.generator.get_state()}
        if states is not None:
            states.reached(taken, now, moving)
        elif checkpoints is not None:
            checkpoints.reached(State(taken, {"path": path._parts(), "state": now}))

    log = checkpoints if states is None else states
    shown = progress and (ranks is None or ranks.first)
    with (
        mode,
        matmul_precision(forward.precision),
        tqdm(total=steps, initial=taken, desc="optimize", unit="step", disable=not shown) as bar,
    ):
        moving.begin(path, velocity, share)
        count, begun = 1, time.monotonic()
        length = moving.length()
        while True:
            moving.refine(sizes.get(taken, moving.controls))
            if watched:
                path = moving.copied_path()
            if checkpoints is not None:
                reached()
            if taken == steps:
                break
            until = min((first for first in sizes if first > taken), default=steps)
            count = count if until is None else min(count, until - taken)
            started = time.monotonic()
            found = moving.take([descent.rate(taken + i, steps) for i in range(count)])
            if found is None:
                break
            lines = _metrics(taken, found, moving.points, descent.objective)
            with moving.callbacks():
                for metrics in lines:
                    history.append(metrics | {"seconds": started - begun})
                    if log is not None:
                        log.record(metrics)
                    if on_step is not None:
                        on_step(metrics, path)
            taken += len(found.energies)
            if found.why:
                if log is not None and found.unsound:
                    log.distrust()
                cause = f"lower lr (now {descent.lr})"
                if not taken and found.unsound:
                    cause = "look at the inputs and the two ends"
                raise ValueError(f"optimisation stopped at step {taken}: {found.why}; {cause}")
            count = moving.at_once
            if checkpoints is not None:
                count = paced(count, (time.monotonic() - started) / len(found.energies))
            bar.update(len(found.energies))
            name = "energy" if descent.objective == "jsd" else "cross_entropy"
            bar.set_postfix_str(f"{name} {lines[-1][name]:.4f} nats", refresh=False)
        moving.choice.finish()
        if taken < (steps or 1):
            raise ValueError(f"batches ended after {taken} of {steps or 1} steps")
        path = moving.copied_path()
        if history:
            last = moving.looked_at(path)
            history += _metrics(taken, last, moving.points, descent.objective)
            history[-1]["seconds"] = time.monotonic() - begun
            history[0].setdefault("euclidean", length)
    if (bad := moving.not_finite(path)) is not None:
        if log is not None:
            log.distrust()
        name, i = bad
        raise ValueError(
            f"{name} is not finite at point {i + 1} after step {taken - 1}; lower lr (now "
            f"{descent.lr})"
        )
    path.history = history
    if descent.nodes is None and (ranks is None or ranks.first):
        _warn_of_no_fall(history, descent.lr)
    return path


def _warn_of_no_fall(history: list[dict], lr: float) -> None:
    """If many steps have left the energy where it was; for each number of points it is another."""
    if len(history) <= FEW:
        return
    ends = history[0], history[-1]
    if "energy" in history[0]:
        what, (first, last) = "energy", ((line["points"] - 1) * line["energy"] for line in ends)
    else:
        what, (first, last) = "loss", (line["cross_entropy"] for line in ends)
    if last > FALLEN * first:
        times = "times N - 1 " if what == "energy" else ""
        warnings.warn(
            f"the {what} did not fall: {times}it was {first:.4g} nats at the first step and is "
            f"{last:.4g} after the last; lower lr (now {lr}), or give more steps",
            stacklevel=4,
        )


def _outside_of_inference(path: Path) -> Path:
    """The path, of which a gradient may be taken."""
    return Path._of(
        {
            part: {name: t.clone() if t.is_inference() else t for name, t in tensors.items()}
            for part, tensors in path._parts().items()
        }
    )


def _saved(
    checkpoints: Checkpoints | None, states: "RankStates | None"
) -> "tuple[State, Stored | None] | None":
    """The state to go on from, and its control points, if they are to be read in parts."""
    if states is not None:
        return states.load("optimize")
    saved = None if checkpoints is None else checkpoints.load("optimize")
    if checkpoints is None or saved is None or "parts" not in saved.values:
        return None if saved is None else (saved, None)
    from fastgeo.ranks.states import Stored

    return saved, Stored(checkpoints._folder_of(saved.step), saved.values)


def _restored(
    path: Path,
    saved: State,
    stored: "Stored | None",
    sizes: dict[int, int],
    descent: Descent,
    ranks: "Ranks | None",
) -> "tuple[Path, dict[str, Tensor], Share | None]":
    """The saved path and its velocity, if it has one, on the device of `path`; on a mesh what this
    rank holds of them, and its share.

    Raises:
        ValueError: the path is not between the same ends, of another kind, or has not as many
            control points as the levels want.
    """
    parts, share = {**saved.tensors["path"]}, None
    velocity = saved.tensors["state"].get("velocity", {})
    one = {name: path.start[name] for name in path.interior}
    if stored is not None:  # as an outline first
        controls = stored.controls(next(iter(one)))
        parts["interior"] = {n: t.expand(controls, *t.shape) for n, t in one.items()}
    found = Path._of(parts).to(path.device)
    size = sizes[max(first for first in sizes if first <= saved.step)]
    points = size if path.free else len(path)
    same = (found.basis, found.free, len(found)) == (Basis(path.kind, size), path.free, points)
    same = same and all(
        name in found_end and torch.equal(found_end[name], tensor)
        for end, found_end in ((path.start, found.start), (path.end, found.end))
        for name, tensor in end.items()
    )
    if not same:
        raise ValueError(
            "the checkpoints hold a path between other ends, or of another number of points"
        )
    if stored is not None:
        rows = range(controls)
        if ranks is not None:
            from fastgeo.ranks.share import Share

            share = Share.of(ranks, found, descent.nodes)
            rows = range(*share.held)
        found = found.with_interior(stored.rows(one, rows, "interior"))
        velocity = stored.rows(one, rows, "velocity")
    device = path.device if ranks is None else ranks.device
    return found.to(device), {name: t.to(device) for name, t in velocity.items()}, share


def _metrics(first: int, found: Taken, points: int, objective: str) -> list[dict]:
    """Of the steps from `first` on, a dict of numbers each.

    The energy is that of N even points: an N - 1-th of the objective.
    """
    energies, lengths, counts = found.energies, found.lengths, found.counts
    if objective == "cross_entropy":
        columns = {"cross_entropy": energies.mean(1)}
    else:
        total = energies if counts is None else energies * counts / (points - 1)
        columns = {"energy": total.sum(1), "sqrt_jsd": energies.sqrt().sum(1)}
    if lengths is not None:
        columns["euclidean"] = lengths[: len(energies)]
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"step": first + i, **dict(zip(columns, row, strict=True)), "points": points}
        for i, row in enumerate(rows)
    ]
