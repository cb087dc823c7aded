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
from fastgeo.step.capture import paced
from fastgeo.step.descent import Descent
from fastgeo.step.diagnose import all_finite, first_not_finite
from fastgeo.step.step import resampled
from fastgeo.step.steps import Steps, Taken
from fastgeo.store.checkpoint import Checkpoints, Groups, State

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

    Returns:
        A new path with the same ends, and with `history` (`fastgeo.Path`) of this call's steps.

    Warns:
        UserWarning: the energy did not fall; at random nodes that is not looked at.

    Raises:
        TypeError: a path, module or batches of another type, or no logits in what the module
            returns.
        ValueError: a path that is not of this module, a mask or targets with -100 whose shape is
            not that of the logits, no labels where the objective needs them, no parameter to train,
            too few batches, no number of steps where the descent needs one, an energy or gradient
            that stops being finite, checkpoints of another path, or cuda_graph=True for a step that
            cannot be captured.

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
    saved = None if checkpoints is None else checkpoints.load("optimize")
    if saved is not None:
        taken, (path, velocity) = saved.step, _restored(path, saved, sizes)
        state = saved.tensors["state"]
        order.load_state_dict(state["order"])
        saved.set_generators()
    mode, updated = evaluation_mode(module), frozenset[str]()
    if recalibrated and (first := order.peek()) is not None:
        inputs = on_device(first[0], path.device)
        own = statistics(module, path.start, inputs)
        mode, updated = batch_statistics(module, own), own.names
        path = settled(path, module, inputs, own, forward) if saved is None else path
    watched = checkpoints is not None or on_step is not None
    moving = Steps(
        module,
        order,
        descent,
        forward,
        capture=cuda_graph,
        device=path.device,
        most=most,
        measured=watched,
        on_choice=on_choice,
    )
    check_buffers(path.start, path.end, module, interpolated=path.interpolated, updated=updated)
    if "nodes" in state:
        moving.generator.set_state(state["nodes"]["generator"])
    with (
        mode,
        matmul_precision(forward.precision),
        tqdm(total=steps, initial=taken, desc="optimize", unit="step", disable=not progress) as bar,
    ):
        moving.begin(path, velocity)
        count, begun = 1, time.monotonic()
        length = path.euclidean().sum().item()
        while True:
            if sizes.get(taken, path.basis.size) != path.basis.size:
                path = moving.step.copied_path().refined(sizes[taken])
                moving.begin(path, resampled(moving.step.velocity(), path))
            if watched:
                path = moving.step.copied_path()
            if checkpoints is not None:
                state = {"order": order.state_dict(), "velocity": moving.step.velocity()}
                if descent.nodes is not None:
                    state["nodes"] = {"generator": moving.generator.get_state()}
                checkpoints.reached(State(taken, {"path": path._parts(), "state": state}))
            if taken == steps:
                break
            until = min((first for first in sizes if first > taken), default=steps)
            count = count if until is None else min(count, until - taken)
            started = time.monotonic()
            found = moving.take([descent.rate(taken + i, steps) for i in range(count)])
            if found is None:
                break
            lines = _metrics(taken, found, len(path), descent.objective)
            for metrics in lines:
                history.append(metrics | {"seconds": started - begun})
                if checkpoints is not None:
                    checkpoints.record(metrics)
                if on_step is not None:
                    on_step(metrics, path)
            taken += len(found.energies)
            if found.why:
                if checkpoints is not None and found.unsound:
                    checkpoints.distrust()
                cause = f"lower lr (now {descent.lr})"
                if not taken and found.unsound:
                    cause = "look at the inputs and the two ends"
                raise ValueError(f"optimisation stopped at step {taken}: {found.why}; {cause}")
            count = moving.at_once
            if checkpoints is not None:
                count = paced(count, (time.monotonic() - started) / len(found.energies))
            bar.update(len(found.energies))
            shown = "energy" if descent.objective == "jsd" else "cross_entropy"
            bar.set_postfix_str(f"{shown} {lines[-1][shown]:.4f} nats", refresh=False)
        moving.choice.finish()
        if taken < (steps or 1):
            raise ValueError(f"batches ended after {taken} of {steps or 1} steps")
        path = moving.step.copied_path()
        if history:
            last = Taken(moving.energies()[None], path.euclidean().sum()[None])
            history += _metrics(taken, last, len(path), descent.objective)
            history[-1]["seconds"] = time.monotonic() - begun
            history[0].setdefault("euclidean", length)
    if not all_finite(path.interior.values()):
        if checkpoints is not None:
            checkpoints.distrust()
        name, i = first_not_finite(path.interior)
        raise ValueError(
            f"{name} is not finite at point {i + 1} after step {taken - 1}; lower lr (now "
            f"{descent.lr})"
        )
    path.history = history
    if descent.nodes is None:
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


def _restored(path: Path, saved: State, sizes: dict[int, int]) -> tuple[Path, dict[str, Tensor]]:
    """The saved path and its velocity, if it has one, on the device of `path`.

    Raises:
        ValueError: the path is not between the same ends, of another kind, or has not as many
            control points as the levels want.
    """
    found = Path._of(saved.tensors["path"]).to(path.device)
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
    velocity = saved.tensors["state"].get("velocity", {})
    return found, {name: tensor.to(path.device) for name, tensor in velocity.items()}


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
