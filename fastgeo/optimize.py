"""Geodesic optimisation: SGD on the energy of a path, the sum of its neighbours' divergences.

Near a solution the energy's Hessian is (Fisher metric) x L / 4 with L = tridiag(-1, 2, -1) along
the path, so its smoothest mode relaxes about (2 (N - 1) / pi)^2 times slower than its roughest.
Multiplying the stacked gradient by the inverse of L, the gradient in the H1 inner product of paths,
removes that factor at the same optimum and learning rate.
"""

from collections.abc import Callable, Iterable
from itertools import count

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.data.inputs import Inputs, Passes, on_device
from fastgeo.data.outputs import rows_that_count
from fastgeo.forward.modes import batch_statistics, evaluation_mode
from fastgeo.path import Path, check_path_of
from fastgeo.stacking.precision import matmul_precision
from fastgeo.step.descent import Descent, resampled
from fastgeo.step.diagnose import all_finite, first_not_finite, where
from fastgeo.step.energy import EndLogits, energy_and_gradient
from fastgeo.step.engines import EngineChoice
from fastgeo.step.levels import levels
from fastgeo.step.memory import path_work
from fastgeo.step.phases import phase
from fastgeo.store.checkpoint import Checkpoints, State


def optimize(
    path: Path,
    module: nn.Module,
    batches: Iterable,
    *,
    steps: int | None = None,
    lr: float = 0.1,
    momentum: float = 0.0,
    lr_schedule: str = "constant",
    precondition: bool = True,
    coarse_to_fine: bool = False,
    engine: str = "auto",
    channels_last: bool | None = None,
    chunk: int | None = None,
    memory_budget: int | str | None = None,
    batchnorm: str = "refuse",
    precision: str = "fp32",
    output: str = "logits",
    mask: str | None = None,
    on_choice: Callable[[dict], None] | None = None,
    on_step: Callable[[dict, Path], None] | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = False,
) -> Path:
    """Move the interior of a path towards the geodesic between its ends.

    Without momentum, and at a constant rate, each step is equivalent to::

        p = [functional_call(module, point, inputs).softmax(-1) for point in path.points()]
        energy = sum(js_div(p[i], p[i + 1]) for i in range(N - 1))
        gradient = torch.autograd.grad(energy, interior)         # [N - 2, ...] each
        interior -= lr * inverse_path_laplacian(N - 2) @ gradient

    Args:
        path: where to start; not changed.
        module: the network of all points, run in eval mode; its parameter values are not used.
        batches: iterable of inputs, or of tuples that begin with inputs and targets. Inputs are a
            tensor [B, ...], or any mapping that holds one, such as a tokenizer's: the keyword
            arguments of the module's forward. Labels in it are dropped unread (a language model
            shifts them, so they do not belong to the rows of its logits), and caches are off. Of
            targets it matters only where they are -100: that row of the logits does not count.
            Gone through again, if it can be, until all steps are done.
        steps: how many; one pass over the batches by default.
        lr: learning rate.
        momentum: of Nesterov, on the preconditioned gradient; 0 for none. In the long run, steps
            are 1 / (1 - momentum) times as long, so the rate is to be smaller.
        lr_schedule: "constant", or the rate falls to 0 behind the last step, "linear" in the step
            or as half a wave, "cosine"; steps must be given for these.
        precondition: multiply the gradient by the inverse path Laplacian; False, without momentum
            and at a constant rate, is the SGD of Tan et al.
        coarse_to_fine: begin with 5 points along the path, and insert midpoints on the way
            (`fastgeo.step.levels`); steps must be given. For a straight line: of any other path,
            what lies between those points is lost.
        engine: "stacked", "vmap" or "loop" as in `fastgeo.stack`, or "auto": they take turns in the
            first steps until the fastest is known. All compute the same up to rounding, so a run
            repeats itself to the last bit only with an engine that is named.
        channels_last: memory format of images; None is the faster one if engine is "auto", else
            False.
        chunk: interior points in one pass. Two chunks' activations are kept at most, nothing is
            computed twice, and the gradient is the same. None for all in one pass.
        memory_budget: choose the chunk so that the activations kept for the backward pass take at
            most so many bytes; a number, or a string as in "8GiB".
        batchnorm: "refuse", or "recalibrate": BatchNorm takes the statistics of each batch, and the
            running ones are left for `fastgeo.recalibrate` to compute.
        precision: "fp32", "tf32" or "bf16" as in `fastgeo.stack`, of the backward pass, too. The
            weights of the path stay in their own dtype, and the divergence in fp32.
        output: name of the logits [B, ..., C] in what the module returns, as in `fastgeo.stack`.
        mask: name of one of the inputs, of the logits' shape without C, as attention_mask is for a
            language model: rows where it is 0 do not count. The energy is the mean over those that
            do, and 0 on a batch without any.
        on_choice: called once with {"engine", "channels_last", "chunk", "seconds": measured a step
            of each candidate, "failed": why others were left out} when the engine is known.
        on_step: called before every update with {"step", "energy": nats, "sqrt_jsd",
            "euclidean", "points": N} on the step's batch, and the path that has them, which may be
            kept.
        checkpoints: where to save the state now and then, and to go on from if there is one: on a
            CPU, to the same result to the last bit. Batches before it are drawn again and left
            aside; random numbers in them must be torch's.
        progress: show a progress bar.

    Returns:
        A new path with the same ends.

    Raises:
        TypeError: a path, module or batches of another type, or no logits in what the module
            returns.
        ValueError: a path that is not of this module, a mask or targets with -100 whose shape is
            not that of the logits, no parameter to train, lr <= 0, momentum
            outside [0, 1), an unknown lr_schedule, too few batches or no number of steps, an
            energy or gradient that stops being finite, or checkpoints of another path.

    Example:
        >>> path = Path.linear(a, b, 25)
        >>> path = optimize(path, module, [inputs], steps=100)
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if coarse_to_fine and steps is None:
        raise ValueError("coarse_to_fine needs the number of steps")
    check_path_of(path, module)
    choice = EngineChoice(
        module,
        engine=engine,
        channels_last=channels_last,
        chunk=chunk,
        memory_budget=memory_budget,
        batchnorm=batchnorm,
        precision=precision,
        output=output,
        work=path_work(momentum),
        on_choice=on_choice,
    )
    mode = evaluation_mode(module)
    if batchnorm == "recalibrate":
        mode = batch_statistics(module, update=False)
    ends = EndLogits(path)
    trained = trained_names(module)
    descent = Descent(
        trained,
        lr=lr,
        momentum=momentum,
        lr_schedule=lr_schedule,
        precondition=precondition,
        steps=steps,
    )
    sizes = levels(len(path), steps) if coarse_to_fine else {0: len(path)}

    order, first = Passes(batches, repeat=steps is not None), 0
    if checkpoints is not None and (saved := checkpoints.load("optimize")) is not None:
        first, (path, descent.velocity) = saved.step, restored(path, saved, sizes, momentum)
        order.load_state_dict(saved.tensors["state"]["order"])
        saved.set_generators()
    step = first
    with (
        mode,
        matmul_precision(precision),
        tqdm(total=steps, initial=first, desc="optimize", unit="step", disable=not progress) as bar,
    ):
        for step in count(first):
            if (points := sizes.get(step, len(path))) != len(path):
                path = path.resample(points)
                descent.velocity = resampled(descent.velocity, points)
                choice.next_level()
            if checkpoints is not None:
                place = {"order": order.state_dict(), "velocity": dict(descent.velocity)}
                checkpoints.reached(State(step, {"path": path._parts(), "state": place}))
            with phase("data"):
                batch = None if step == steps else next(order, None)
            if batch is None:
                break
            given, targets = batch
            inputs = on_device(given, path.device)
            counted = rows_that_count(inputs, targets, mask)
            if choice.chosen is None:
                one = {name: tensor[None] for name, tensor in path.start.items()}
                most = max(sizes.values()) - 2
                choice.prepare(one, inputs, points=len(path) - 2, most=most)
            energies, gradient = choice.run(
                lambda engine, path=path, given=given, x=inputs, counted=counted: (
                    energy_and_gradient(path, engine, x, trained, ends(given, x, engine), counted)
                )
            )
            if not torch.isfinite(energies).all():
                if checkpoints is not None:
                    checkpoints.distrust()
                cause = f"lower lr (now {lr})" if step else "look at the inputs and the two ends"
                why = _why_not_finite(path, module, inputs, energies)
                raise ValueError(f"optimisation stopped at step {step}: {why}; {cause}")
            if not all_finite(gradient.values()):
                name, i = first_not_finite(gradient)
                raise ValueError(
                    f"optimisation stopped at step {step}: the gradient of {name} is not finite at "
                    f"point {i + 1}, between edges {i} and {i + 1}; lower lr (now {lr})"
                )
            if checkpoints is not None or on_step is not None:  # or nobody asks for lengths
                metrics = _metrics(step, energies, path)
                if checkpoints is not None:
                    checkpoints.record(metrics)
                if on_step is not None:
                    on_step(metrics, path)
            with phase("update"):
                path = descent.update(path, gradient, step)
            bar.update()
            bar.set_postfix_str(f"energy {energies.sum():.4f} nats", refresh=False)
    choice.finish()
    if step < (steps or 1):
        raise ValueError(f"batches ended after {step} of {steps or 1} steps")
    if not all_finite(path.interior.values()):
        if checkpoints is not None:
            checkpoints.distrust()
        name, i = first_not_finite(path.interior)
        raise ValueError(
            f"{name} is not finite at point {i + 1} after step {step - 1}; lower lr (now {lr})"
        )
    return path


def restored(
    path: Path, saved: State, sizes: dict[int, int], momentum: float
) -> tuple[Path, dict[str, Tensor]]:
    """The saved path and, with momentum, its velocity, on the device of `path`.

    Raises:
        ValueError: the path is not between the same ends, or has not as many points as the
            `levels` want.
    """
    found = Path(**saved.tensors["path"]).to(path.device)
    points = sizes[max(first for first in sizes if first <= saved.step)]
    same = len(found) == points and all(
        name in found_end and torch.equal(found_end[name], tensor)
        for end, found_end in ((path.start, found.start), (path.end, found.end))
        for name, tensor in end.items()
    )
    if not same:
        raise ValueError(
            "the checkpoints hold a path between other ends, or of another number of points"
        )
    velocity = saved.tensors["state"].get("velocity", {}) if momentum else {}
    return found, {name: tensor.to(path.device) for name, tensor in velocity.items()}


def _why_not_finite(path: Path, module: nn.Module, inputs: Inputs, energies: Tensor) -> str:
    """In words: the first edge that has no finite divergence, and the layer where that begins."""
    edge = int((~torch.isfinite(energies)).nonzero()[0])
    for point in (edge, edge + 1):
        reason = where(module, path._point(point), inputs)
        if "every layer" not in reason:
            break
    return (
        f"the divergence of edge {edge} is {energies[edge].item()}, since at point {point} {reason}"
    )


def trained_names(module: nn.Module) -> dict[str, str]:
    """Name of every parameter to train -> the first name of it (tied parameters have several)."""
    first: dict[nn.Parameter, str] = {}
    names = module.named_parameters(remove_duplicate=False)
    trained = {name: first.setdefault(p, name) for name, p in names if p.requires_grad}
    if not trained:
        raise ValueError("the module has no parameter with requires_grad to train")
    return trained


def _metrics(step: int, energies: Tensor, path: Path) -> dict:
    return {
        "step": step,
        "energy": energies.sum().item(),
        "sqrt_jsd": energies.sqrt().sum().item(),
        "euclidean": path.euclidean().sum().item(),
        "points": len(path),
    }
