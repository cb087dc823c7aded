"""Nudged elastic bands with automatic insertion, for comparison with what fastgeo does.

Jónsson, Mills and Jacobsen, "Nudged elastic band method for finding minimum energy paths of
transitions" (1998), whose springs are finite; Draxler et al., "Essentially No Barriers in Neural
Network Energy Landscape" (ICML 2018), whose AutoNEB begins with few pivots and inserts more where
the loss between two of them rises above the line, and whose tangent is that to the neighbour of the
higher loss.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastgeo import Forward, Path, evaluate, stack
from fastgeo.forward.modes import evaluation_mode
from fastgeo.step.energy import losses_and_gradient
from fastgeo.step.engines import Engine
from fastgeo.step.step import trained_names

FIRST = 3  # pivots between the ends at first
CYCLES = 4  # of equal cost, each at half the rate of the one before
BETWEEN = 4  # networks looked at in each gap
RISE = 0.2  # of the range of the losses, above the line, where a pivot is inserted
MOMENTUM = 0.9
SPRING = 1.0


def elastic_band(
    a: dict[str, Tensor],
    b: dict[str, Tensor],
    module: nn.Module,
    batches: Iterator,
    *,
    lr: float,
    networks: int,
) -> Path:
    """A path of pivots between two networks.

    Args:
        a, b: states.
        module: the network of all.
        batches: of inputs and labels, without end.
        lr: rate of the first cycle.
        networks: forward and backward passes of one network on one batch that it may cost; a
            forward pass alone counts as a third.
    """
    path, left = Path.linear(a, b, FIRST + 2), float(networks)
    for cycle in range(CYCLES):
        share = left / (CYCLES - cycle)
        pivots = len(path) - 2
        looks = ((pivots + 1) * (BETWEEN + 1) - 1) / 3 if cycle < CYCLES - 1 else 0
        steps = max(1, int((share - looks) / pivots))
        path = _relaxed(path, module, batches, lr / 2**cycle, steps)
        left -= steps * pivots
        if cycle < CYCLES - 1:
            path = _inserted(path, module, next(batches))
            left -= looks
    return path


def _relaxed(path: Path, module: nn.Module, batches: Iterator, lr: float, steps: int) -> Path:
    """After some steps of SGD along the forces on the pivots."""
    engine, trained = Engine(stack(module, engine="stacked")), trained_names(module)
    names = list(dict.fromkeys(trained.values()))
    ends = torch.stack([_flat(state, names, 0) for state in (path.start, path.end)])
    pivots, shapes = _flat(path.interior, names, 1), {k: path.interior[k].shape for k in names}
    velocity = torch.zeros_like(pivots)
    end_losses = None
    for _ in range(steps):
        inputs, labels = next(batches)
        now = path.with_interior(path.interior | _named(pivots, shapes, trained))
        with evaluation_mode(module):
            if end_losses is None:  # they only say which neighbour of an outer pivot is higher
                both = {k: torch.stack([path.start[k], path.end[k]]) for k in path.start}
                logits = engine.forward(both, inputs).detach()
                end_losses = torch.stack([nn.functional.cross_entropy(x, labels) for x in logits])
            losses, found = losses_and_gradient(now, engine, inputs, trained, labels)
        gradient = _flat(found, names, 1) * len(pivots)  # of each pivot's own loss
        whole = torch.cat([ends[:1], pivots, ends[1:]])
        velocity = MOMENTUM * velocity + force(whole, gradient, end_losses, losses)
        pivots = pivots + lr * velocity
    return path.with_interior(path.interior | _named(pivots, shapes, trained))


def force(whole: Tensor, gradient: Tensor, end_losses: Tensor, losses: Tensor) -> Tensor:
    """[M, P]: of the loss across the band, of springs along it.

    Args:
        whole: [M + 2, P], the pivots with both ends.
        gradient: [M, P], of each pivot's loss.
        end_losses, losses: [2] and [M] nats.
    """
    every = torch.cat([end_losses[:1], losses, end_losses[1:]])
    gaps = whole.diff(dim=0)
    uphill = (every[2:] > every[:-2])[:, None]
    tangent = torch.where(uphill, gaps[1:], gaps[:-1])  # towards the higher neighbour
    tangent = tangent / tangent.norm(dim=1, keepdim=True)
    lengths = gaps.norm(dim=1)
    across = gradient - (gradient * tangent).sum(1, keepdim=True) * tangent
    return SPRING * lengths.diff()[:, None] * tangent - across


def _inserted(path: Path, module: nn.Module, batch: tuple[Tensor, Tensor]) -> Path:
    """With a pivot in every gap whose loss rises much above the line, where it does so most."""
    parts = BETWEEN + 1
    fine = path.resample((len(path) - 1) * parts + 1)
    found = evaluate(fine, module, {"batch": batch}, forward=Forward(engine="stacked"))
    losses = torch.tensor(found.splits["batch"].loss)
    threshold = RISE * (losses.max() - losses.min())
    kept = [0]
    for gap in range(len(path) - 1):
        own = losses[gap * parts : (gap + 1) * parts + 1]
        rise = own - torch.lerp(own[0], own[-1], torch.linspace(0, 1, len(own)))
        if rise.max() > threshold:
            kept.append(gap * parts + int(rise.argmax()))
        kept.append((gap + 1) * parts)
    chosen = torch.tensor(kept[1:-1]) - 1
    return Path(path.start, {k: t[chosen] for k, t in fine.interior.items()}, path.end)


def _flat(tensors: dict[str, Tensor], names: list[str], axis: int) -> Tensor:
    """[P], or [M, P] with axis 1."""
    return torch.cat([tensors[name].flatten(axis) for name in names], axis)


def _named(flat: Tensor, shapes: dict[str, torch.Size], trained: dict[str, str]) -> dict:
    sizes = [shape[1:].numel() for shape in shapes.values()]
    parts = dict(zip(shapes, flat.split(sizes, 1), strict=True))
    return {n: parts[first].reshape(-1, *shapes[first][1:]) for n, first in trained.items()}
