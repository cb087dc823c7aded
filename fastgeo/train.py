"""Train K networks from different seeds at once, as one stacked network with K inputs."""

import contextlib
import math
import string
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.data.inputs import Passes, Stream, each_tensor, on_device, tensors_of
from fastgeo.data.loaders import Batch, LoaderData
from fastgeo.data.outputs import IGNORED, label_rows, logits_of, rows_that_count
from fastgeo.data.stored import Stored
from fastgeo.forward.options import Forward
from fastgeo.schedule import Training
from fastgeo.stacking.module import part_of
from fastgeo.stacking.precision import matmul_precision
from fastgeo.step.capture import (
    AT_ONCE,
    NotCaptured,
    Replay,
    captured_forward,
    captures,
    check_capturable,
    paced,
)
from fastgeo.step.diagnose import all_finite, first_not_finite, where
from fastgeo.step.engines import Engine, EngineChoice
from fastgeo.store.checkpoint import Checkpoints, State

States = list[dict[str, Tensor]]
LETTERS = string.ascii_lowercase  # of the networks


def train_ends(
    make_module: Callable[[], nn.Module],
    data: Stored | LoaderData,
    seeds: Sequence[int],
    training: Training = Training(),
    *,
    forward: Forward = Forward(),
    cuda_graph: bool | None = None,
    on_choice: Callable[[dict], None] | None = None,
    on_step: Callable[[dict, States], None] | None = None,
    checkpoints: Checkpoints | None = None,
    progress: bool = False,
) -> States:
    """K independently trained networks, in one pass a step.

    Each network has its own initial weights, order of images and augmentation, all from its own
    seed, so it does not depend on which others are trained beside it (up to rounding); dropout
    alone draws for all of them, from the first seed. SGD with Nesterov momentum, or AdamW, under a
    one-cycle schedule on the mean cross-entropy of the rows that count.

    Args:
        make_module: returns a freshly initialised module; called once a seed.
        data: what to train on, on the device to train on.
        seeds: one a network.
        training: epochs, batch size and the schedule of the rate.
        forward: engine, chunk and the like (`fastgeo.Forward`). With batchnorm="recalibrate" a
            module with BatchNorm is trained as it is, every network with statistics of its own, and
            a batch of one input that comes after larger ones is left out.
        cuda_graph: whether losses and gradients are captured in a CUDA graph and replayed, the
            losses of 50 steps being read together, as in `fastgeo.optimize`.
        on_choice: as in `fastgeo.optimize`.
        on_step: called every step with {"step", "loss": K numbers, nats, "lr"} and K states which
            may be kept: those that had this loss, or, if steps are captured, those that had the
            first of the losses that are read together.
        checkpoints: as in `fastgeo.optimize`.
        progress: show a progress bar.

    Returns:
        K state dicts.

    Raises:
        ValueError: a batch size or epoch count that leaves fewer than two steps, or a loss or
            gradient that stops being finite, or cuda_graph=True for a step that cannot be captured.
    """
    steps = training_steps(data, training)
    states: States = []
    batches: list[Stream] = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = make_module().train()
        state = module.state_dict()
        states.append({name: t.detach().to(data.device) for name, t in state.items()})
        generator = torch.Generator().manual_seed(seed)
        stream = data.shuffled(training.train_batch_size, generator)
        batches.append(Passes(stream, repeat=False, alone=forward.batchnorm == "refuse"))
    saved = None if checkpoints is None else checkpoints.load("train")
    if saved is not None:
        own = saved.tensors["ends"].values()
        states = [{name: t.to(data.device) for name, t in state.items()} for state in own]
    stacked = {n: torch.stack([state[n] for state in states]).contiguous() for n in states[0]}
    first: dict[nn.Parameter, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stacked[name] = stacked[first.setdefault(parameter, name)]  # tied ones stay tied
    trained = [name for parameter, name in first.items() if parameter.requires_grad]
    weights = [stacked[name].requires_grad_() for name in trained]
    losses = _Losses(module, stacked, forward, cuda_graph, data.device, on_choice)

    optimizer = _optimizer(weights, training)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=training.train_lr,
        total_steps=steps,
        pct_start=max(training.warmup_fraction, 2 / steps),  # OneCycleLR divides by 0 below that
        base_momentum=training.momentum_low,
        max_momentum=training.momentum_high,
        div_factor=training.lr_start_divisor,
        final_div_factor=training.lr_end_divisor,
    )
    inputs, first_step = training.train_batch_size * len(seeds), 0
    lower = f"lower train_lr (now {training.train_lr})"
    with (
        seeded(seeds[0], data.device),
        matmul_precision(forward.precision),
        tqdm(total=steps * inputs, desc="train", unit="input", disable=not progress) as bar,
    ):
        if saved is not None:
            first_step = saved.step
            for i, order in enumerate(batches):
                order.load_state_dict(saved.tensors["state"][f"order {i}"])
            _restore(optimizer, schedule, saved, trained)
            saved.set_generators()
            bar.update(first_step * inputs)
        step, count = first_step, 1
        while step < steps:
            if checkpoints is not None:
                checkpoints.reached(_state(step, stacked, trained, optimizer, schedule, batches))
            kept = [] if on_step is None else _unstack(stacked)
            found: list[Tensor] = []
            started, rates, why = time.monotonic(), [], ""
            while len(found) < min(count, steps - step) and not why:
                drawn = [
                    (on_device(inputs, data.device), labels.to(data.device))
                    for inputs, labels in map(next, batches)
                ]
                found.append(losses(drawn))
                rates.append(schedule.get_last_lr()[0])
                if losses.at_once == 1:
                    why = _why_not_finite(module, stacked, drawn, found[0])
                if not why:
                    optimizer.step()
                if step + len(found) < steps:
                    schedule.step()
            loss = torch.stack(found).cpu()  # [steps, K]; here the host waits
            finite = loss.isfinite().all(1).tolist()
            good = 0 if why else (finite + [False]).index(False)
            for values, lr in zip(loss[:good].tolist(), rates, strict=False):
                metrics = {"step": step, "loss": values, "lr": lr}
                if checkpoints is not None:
                    checkpoints.record(metrics)
                if on_step is not None:
                    on_step(metrics, kept)
                step += 1
            if good < len(found):
                if checkpoints is not None and not finite[0]:
                    checkpoints.distrust()
                why = why or _which_not_finite(loss[good])
                raise ValueError(f"training stopped at step {step} of {steps}: {why}; {lower}")
            count = paced(losses.at_once, (time.monotonic() - started) / len(found))
            bar.update(len(found) * inputs)
            bar.set_postfix_str(f"loss {loss[-1].mean():.3f} nats", refresh=False)
    losses.choice.finish()
    if not all_finite(stacked.values()):
        name, k = first_not_finite(stacked)
        raise ValueError(f"{name} of network {LETTERS[k]} is not finite after training; {lower}")
    return _unstack(stacked)


def _optimizer(weights: list[Tensor], training: Training) -> torch.optim.Optimizer:
    decay = training.weight_decay
    if training.optimizer == "adamw":
        return torch.optim.AdamW(weights, training.train_lr, betas=(0.9, 0.99), weight_decay=decay)
    return torch.optim.SGD(
        weights, training.train_lr, momentum=0.9, nesterov=True, weight_decay=decay
    )


def _state(
    step: int,
    stacked: dict[str, Tensor],
    trained: list[str],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batches: list[Stream],
) -> State:
    own = optimizer.state_dict()
    state: dict[str, dict[str, Tensor]] = {}  # "moment KEY" -> name of a weight -> tensor
    for i, moments in own["state"].items():
        for key, tensor in moments.items():
            state.setdefault(f"moment {key}", {})[trained[i]] = tensor.clone()
    state |= {f"order {i}": order.state_dict() for i, order in enumerate(batches)}
    ends = _unstack(stacked)
    return State(
        step,
        {"ends": dict(zip(LETTERS, ends, strict=False)), "state": state},
        {"groups": own["param_groups"], "schedule": schedule.state_dict()},
    )


def _restore(
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    saved: State,
    trained: list[str],
) -> None:
    own: dict[int, dict[str, Tensor]] = {}
    for group, moments in saved.tensors["state"].items():
        kind, _, key = group.partition(" ")
        for name, tensor in moments.items() if kind == "moment" else ():
            own.setdefault(trained.index(name), {})[key] = tensor
    optimizer.load_state_dict({"state": own, "param_groups": saved.values["groups"]})
    schedule.load_state_dict(saved.values["schedule"])


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's random numbers from a seed for a while, and as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Losses:
    """The mean loss of every network on its batch; leaves the gradient of their sum.

    Args:
        stacked: name -> [K, ...], whose gradients are wanted.
        capture: as `cuda_graph` of `train_ends`.

    Attributes:
        choice: of the engine.
    """

    def __init__(
        self,
        module: nn.Module,
        stacked: dict[str, Tensor],
        forward: Forward,
        capture: bool | None,
        device: torch.device,
        on_choice: Callable[[dict], None] | None,
    ):
        self._module, self._stacked, self._forward = module, stacked, forward
        self._device, self._on_choice = device, on_choice
        self._must, self._captures = bool(capture), captures(capture, forward, device)
        self._replay: Replay | None = None
        self.choice = self._new_choice()

    @property
    def at_once(self) -> int:
        """How many steps are read together, at most."""
        return AT_ONCE if self._captures else 1

    def __call__(self, drawn: list[Batch]) -> Tensor:
        """[K] nats of K batches."""
        first = not self.choice.has_begun
        if first:
            try:
                self._prepare(drawn)
            except NotCaptured:
                if self._must:
                    raise
                self._captures = False
                self.choice = self._new_choice()
                self._prepare(drawn)
        if first or not self._captures:
            return self.choice.run(lambda engine: self._run(engine, drawn, check=first))[0]
        if self._replay is None:
            self._replay = Replay(self._captured, self._device, [])
        loss, gradients = self._replay(drawn)
        for tensor, gradient in zip(self._stacked.values(), gradients, strict=True):
            tensor.grad = gradient
        return loss.clone()

    def _new_choice(self) -> EngineChoice:
        how = captured_forward(self._forward, self._device) if self._captures else self._forward
        return EngineChoice(self._module, how, work="training", on_choice=self._on_choice)

    def _prepare(self, drawn: list[Batch]) -> None:
        one = {name: tensor[:1].detach() for name, tensor in self._stacked.items()}
        inputs = each_tensor(lambda tensor: tensor[None], drawn[0][0])
        try:
            self.choice.prepare(one, inputs, per_point=True, points=len(drawn))
        except ValueError as error:
            raise NotCaptured(str(error)) if self._captures else error from error
        if self._captures and self.choice.chosen is not None:
            check_capturable(self.choice.chosen.network)

    def _captured(self, drawn: list[Batch]) -> tuple[Tensor, list[Tensor | None]]:
        assert self.choice.chosen is not None  # it was named, so it is known at once
        return self._run(self.choice.chosen, drawn, check=False)

    def _run(
        self, engine: Engine, drawn: list[Batch], *, check: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """[K] nats, and the gradients of all stacked tensors."""
        for tensor in self._stacked.values():
            tensor.grad = None
        losses = []
        for part in _alike(engine.chunks(len(drawn)), drawn):
            own = _stacked([inputs for inputs, _ in drawn[part]])
            labels = torch.stack([labels for _, labels in drawn[part]])  # [k, B, ...]
            outputs = engine.network(part_of(self._stacked, part), own, per_point=True)
            logits = logits_of(outputs)  # [k, B, ..., C]
            counted = rows_that_count(own, None, self._forward.mask)
            rows = label_rows("training data", labels, outputs[None], counted, check=check)
            loss = F.cross_entropy(logits.flatten(0, 1), rows, reduction="none")
            loss = loss.view(len(logits), -1)
            count = (rows != IGNORED).view_as(loss).sum(1).clamp(min=1)
            loss = loss.mean(1) * (loss.shape[1] / count.to(loss))  # 1 where all count: bit for bit
            loss.sum().backward()
            losses.append(loss.detach())
        return torch.cat(losses), [tensor.grad for tensor in self._stacked.values()]


def _alike(chunks: Sequence[slice], drawn: Sequence[Batch]) -> Iterator[slice]:
    """The chunks, parted where batches of neighbours have other shapes, as padded ones may."""
    shapes = [[tensor.shape for tensor in (*tensors_of(x), y)] for x, y in drawn]
    for chunk in chunks:
        first = chunk.start
        for k in range(first + 1, chunk.stop + 1):
            if k == chunk.stop or shapes[k] != shapes[first]:
                yield slice(first, k)
                first = k


def _why_not_finite(
    module: nn.Module, stacked: dict[str, Tensor], drawn: Sequence[Batch], loss: Tensor
) -> str:
    """The loss or gradient that is not finite, in words; empty if there is none."""
    if which := _which_not_finite(loss):
        k = int((~loss.isfinite()).nonzero()[0])
        state = {name: tensor[k] for name, tensor in stacked.items()}
        return f"{which}, since {where(module, state, drawn[k][0])}"
    gradients = {name: t.grad for name, t in stacked.items() if t.grad is not None}
    if not all_finite(gradients.values()):
        name, k = first_not_finite(gradients)
        return f"the gradient of {name} of network {LETTERS[k]} is not finite"
    return ""


def _which_not_finite(loss: Tensor) -> str:
    """The first network whose loss is not finite, in words; empty if there is none."""
    for k, value in enumerate(loss.tolist()):
        if not math.isfinite(value):
            return f"the loss of network {LETTERS[k]} is {value}"
    return ""


def _stacked(inputs: list[Any]) -> Any:
    """Inputs of networks as one, tensors [k, B, ...]."""
    if isinstance(inputs[0], Mapping):
        return {name: _stacked([own[name] for own in inputs]) for name in inputs[0]}
    if isinstance(inputs[0], Tensor):
        return torch.stack(inputs)
    if any(value != inputs[0] for value in inputs):
        raise ValueError(f"an input that is no tensor differs between the networks: {inputs}")
    return inputs[0]


def training_steps(data: Stored | LoaderData, training: Training) -> int:
    """How many steps a training takes; ValueError if fewer than two."""
    steps = training.epochs * data.batches_per_epoch(training.train_batch_size)
    if steps < 2:
        raise ValueError(
            f"epochs ({training.epochs}) and train_batch_size ({training.train_batch_size}) leave "
            f"fewer than two steps on {data.training_size}"
        )
    return steps


def _unstack(stacked: dict[str, Tensor]) -> States:
    """[K, ...] tensors as K state dicts, copied."""
    networks = zip(*(tensor.detach().clone().unbind(0) for tensor in stacked.values()), strict=True)
    return [dict(zip(stacked, network, strict=True)) for network in networks]
