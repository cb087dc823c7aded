"""Train K networks from different seeds at once, as one stacked network with K inputs."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.config import TrainConfig
from fastgeo.data import Dataset
from fastgeo.stacking import stack

States = list[dict[str, Tensor]]


def train_ends(
    make_module: Callable[[], nn.Module],
    dataset: Dataset,
    seeds: Sequence[int],
    config: TrainConfig,
    *,
    on_step: Callable[[dict, States], None] | None = None,
    progress: bool = False,
) -> States:
    """K independently trained networks, in one pass a step.

    Each network has its own initial weights, order of images and augmentation, all from its own
    seed, so it does not depend on which others are trained beside it (up to rounding). SGD with
    Nesterov momentum under a one-cycle schedule.

    Args:
        make_module: returns a freshly initialised module; called once a seed.
        dataset: on the device to train on.
        seeds: one a network.
        config: epochs, train_batch_size, train_lr and the rest of the schedule.
        on_step: called every step with {"step", "loss": K numbers, nats, "lr"} and the K states
            that had this loss, which may be kept.
        progress: show a progress bar.

    Returns:
        K state dicts.

    Raises:
        ValueError: a batch size or epoch count that leaves fewer than two steps, or a loss that
            stops being finite.
    """
    steps = training_steps(dataset, config)
    device = dataset.train.images.device
    states, batches = [], []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = make_module()
        states.append({name: t.detach().to(device) for name, t in module.state_dict().items()})
        generator = torch.Generator().manual_seed(seed)
        batches.append(dataset.shuffled(config.train_batch_size, generator))
    network = stack(module)
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    weights = [stacked[name].requires_grad_() for name, _ in module.named_parameters()]

    optimizer = torch.optim.SGD(
        weights, config.train_lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=config.train_lr,
        total_steps=steps,
        pct_start=max(config.warmup_fraction, 2 / steps),  # OneCycleLR divides by 0 below that
        base_momentum=config.momentum_low,
        max_momentum=config.momentum_high,
        div_factor=config.lr_start_divisor,
        final_div_factor=config.lr_end_divisor,
    )
    batch = config.train_batch_size * len(seeds)
    with tqdm(total=steps * batch, desc="train", unit="img", disable=not progress) as bar:
        for step in range(steps):
            inputs, labels = (torch.stack(t) for t in zip(*map(next, batches), strict=True))
            logits = network(stacked, inputs, per_point=True)  # [K, B, C]
            row_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            loss = row_loss.unflatten(0, labels.shape).mean(1)  # [K]
            if not loss.isfinite().all():
                raise ValueError(
                    f"training stopped at step {step} of {steps}: the loss is {loss.tolist()}; "
                    f"lower train-lr (now {config.train_lr})"
                )
            optimizer.zero_grad()
            loss.sum().backward()
            if on_step is not None:
                rate = schedule.get_last_lr()[0]
                on_step({"step": step, "loss": loss.tolist(), "lr": rate}, _unstack(stacked))
            optimizer.step()
            if step < steps - 1:
                schedule.step()
            bar.update(batch)
            bar.set_postfix_str(f"loss {loss.mean():.3f} nats", refresh=False)
    for name, tensor in stacked.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} is not finite after training; lower train-lr (now {config.train_lr})"
            )
    return _unstack(stacked)


def training_steps(dataset: Dataset, config: TrainConfig) -> int:
    """How many steps a training takes; ValueError if fewer than two."""
    images = len(dataset.train.labels)
    steps = config.epochs * (images // config.train_batch_size)
    if steps < 2:
        raise ValueError(
            f"epochs ({config.epochs}) and train-batch-size ({config.train_batch_size}) leave "
            f"fewer than two steps on {images} training images"
        )
    return steps


def _unstack(stacked: dict[str, Tensor]) -> States:
    """[K, ...] tensors as K state dicts, copied."""
    networks = zip(*(tensor.detach().clone().unbind(0) for tensor in stacked.values()), strict=True)
    return [dict(zip(stacked, network, strict=True)) for network in networks]
