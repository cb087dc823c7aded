"""Geodesic optimisation in steps that a GPU replays (`fastgeo.step.static`), level by level."""

import time
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.optimize import restored
from fastgeo.path import Path
from fastgeo.step.descent import resampled
from fastgeo.step.diagnose import all_finite
from fastgeo.step.levels import levels
from fastgeo.step.sources import source_of
from fastgeo.step.static import StaticStep
from fastgeo.store.checkpoint import Checkpoints, State

SECONDS = 5.0  # to the next look at the energies, about, if states are saved


def optimize_static(
    path: Path,
    module: nn.Module,
    batches: Iterable,
    *,
    steps: int,
    lr: float = 0.1,
    momentum: float = 0.0,
    lr_schedule: str = "constant",
    precondition: bool = True,
    coarse_to_fine: bool = False,
    precision: str = "fp32",
    output: str = "logits",
    mask: str | None = None,
    channels_last: bool | None = None,
    chunk: int | None = None,
    memory_budget: int | str | None = None,
    capture: bool | None = None,
    read_every: int = 50,
    on_choice: Callable[[dict], None] | None = None,
    on_read: Callable[[list[dict], Path], None] | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = False,
) -> Path:
    """`fastgeo.optimize` with a step that a GPU replays, and energies that are read now and then.

    The steps are the same up to rounding.

    Args:
        path, module, lr, momentum, lr_schedule, precondition, coarse_to_fine, precision, output,
            mask, chunk, memory_budget, on_choice, progress: as in `fastgeo.optimize`; the module
            must be one that can be stacked.
        batches: as in `fastgeo.optimize`, all of one shape, of which `read_every` are copied to the
            device at a time; what is no tensor in them is the same in all, and no target is -100.
            Those of `Dataset.shuffled` are made there, of data that is there: the host only draws
            numbers.
        steps: how many.
        channels_last: memory format of images and weights; by default on a GPU.
        capture: whether the step is captured in a CUDA graph, once for each number of points; by
            default on a GPU.
        read_every: steps between two looks at the energies, and for which inputs are kept.
        on_read: called after so many steps with the metrics of each, as `on_step` of
            `fastgeo.optimize`, and the path behind them; also before an error, with those of the
            steps before it.
        checkpoints: as in `fastgeo.optimize`; the steps between two looks then take some seconds at
            most, behind which a state may be saved, or the loop stop.

    Returns:
        A new path with the same ends.

    Raises:
        TypeError: a path, module or batches of another type.
        ValueError: as `fastgeo.optimize`, an energy that is not finite when it is read, a module
            that cannot be stacked, batches that differ in shape, or targets of -100.

    Example:
        >>> digits = fastgeo.data.load("digits")
        >>> batches = digits.shuffled(128, torch.Generator().manual_seed(0))
        >>> path = optimize_static(path, module, batches, steps=100)
    """
    if steps < 1 or read_every < 1:
        raise ValueError(f"steps and read_every must be at least 1, got {steps} and {read_every}")
    if capture is None:
        capture = path.device.type == "cuda"
    how = dict(
        lr=lr,
        momentum=momentum,
        lr_schedule=lr_schedule,
        steps=steps,
        precondition=precondition,
        precision=precision,
        output=output,
        mask=mask,
        channels_last=channels_last,
        chunk=chunk,
        memory_budget=memory_budget,
        lengths=on_read is not None or checkpoints is not None,
        on_choice=on_choice,
    )
    source = source_of(batches, path.device)
    sizes = levels(len(path), steps) if coarse_to_fine else {0: len(path)}
    taken, velocity, static, choice = 0, {}, None, None
    most_points = max(sizes.values()) - 2
    block = read_every if checkpoints is None else 1
    if checkpoints is not None and (saved := checkpoints.load("optimize")) is not None:
        taken, (path, velocity) = saved.step, restored(path, saved, sizes, momentum)
        source.stream.load_state_dict(saved.tensors["state"]["order"])
        saved.set_generators()
    with tqdm(
        total=steps, initial=taken, desc="optimize", unit="step", disable=not progress
    ) as bar:
        while True:
            if taken in sizes:
                path, static = path.resample(sizes[taken]), None
                velocity = resampled(velocity, sizes[taken])
            if checkpoints is not None:
                place = {"order": source.stream.state_dict(), "velocity": velocity}
                checkpoints.reached(State(taken, {"path": path._parts(), "state": place}))
            if taken == steps:
                return path
            until = min((first for first in sizes if first > taken), default=steps)
            block = min(block, until - taken)
            if static is None:
                state = dict(first=taken, velocity=velocity, take=block)
                most = min(read_every, until - taken)
                state |= dict(read_every=most, choice=choice, most=most_points)
                static = StaticStep(path, module, source, **how, **state)
                choice = static.choice
                filled = static.filled
                if capture:
                    static.capture()
            else:
                filled = static.fill(block)
            if filled == 0:
                raise ValueError(f"batches ended after {taken} of {steps} steps")
            started = time.monotonic()
            for _ in range(filled):
                static.step()
            energies = static.energies[:filled].cpu()  # here the host waits
            each = max(1e-6, (time.monotonic() - started) / filled)
            block = read_every
            if checkpoints is not None:
                block = min(block, max(1, int(SECONDS / each)))
            if static.lengths is not None or taken + filled == until:
                path = static.path()
                velocity = {name: tensor.clone() for name, tensor in static.velocities.items()}
            bad = (~energies.isfinite()).nonzero().tolist()
            good = bad[0][0] if bad else filled
            if static.lengths is not None:
                metrics = _metrics(taken, energies[:good], static.lengths[:good])
                for line in metrics if checkpoints is not None else ():
                    checkpoints.record(line)
                if on_read is not None and metrics:
                    on_read(metrics, path)
            if bad:
                if checkpoints is not None and good == 0:
                    checkpoints.distrust()
                edge = bad[0][1]
                raise ValueError(
                    f"optimisation stopped at step {taken + good}: the divergence of edge {edge} "
                    f"is {energies[good, edge].item()}; lower lr (now {lr}), or look at the inputs "
                    "and the ends"
                )
            taken += filled
            if taken == steps and not all_finite(path.interior.values()):
                raise ValueError(
                    f"the path is not finite after step {taken - 1}; lower lr (now {lr})"
                )
            bar.update(filled)
            bar.set_postfix_str(f"energy {energies[-1].sum():.4f} nats", refresh=False)


def _metrics(first: int, energies: Tensor, lengths: Tensor) -> list[dict]:
    """Of steps from `first` on: energies [K, E] nats, lengths [K] and more of the path."""
    columns = energies.sum(1), energies.sqrt().sum(1), lengths
    rows = zip(*(column.tolist() for column in columns), strict=True)
    names = ("energy", "sqrt_jsd", "euclidean")
    return [
        {"step": first + i, **dict(zip(names, row, strict=True)), "points": energies.shape[1] + 1}
        for i, row in enumerate(rows)
    ]
