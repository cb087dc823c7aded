"""Loss, accuracy, barriers and lengths of a path."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from fastgeo_kernels import path_fisher_rao, path_js_div
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.optimize import check_path_of
from fastgeo.path import Path
from fastgeo.stacking import evaluation_mode, stack

Data = tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SplitEvaluation:
    """One set of labelled inputs along the path.

    Attributes:
        loss: [N] mean cross-entropy, nats.
        accuracy: [N] share of inputs classified correctly.
        barrier: highest loss less the mean of the two ends, nats.
        barrier_above_line: highest excess of the loss of point i over the straight line between
            the losses of the ends at i / (N - 1), nats; 0 if no point is above it.
    """

    loss: list[float]
    accuracy: list[float]
    barrier: float
    barrier_above_line: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns; the lengths are those of the distributions on the first split.

    Attributes:
        splits: name -> SplitEvaluation.
        energy: sum over edges of the mean Jensen-Shannon divergence, nats.
        sqrt_jsd: sum over edges of its root; the length of Tan et al., Figure 2.
        fisher_rao: Fisher-Rao length of the path on p(x) p(y | x), radians.
        fisher_rao_lower_bound: distance of the ends, below which no path can be, radians.
        euclidean: length in parameter space.
    """

    splits: dict[str, SplitEvaluation]
    energy: float
    sqrt_jsd: float
    fisher_rao: float
    fisher_rao_lower_bound: float
    euclidean: float

    def to_json(self) -> dict:
        """Plain dictionaries, the splits next to the lengths."""
        content = asdict(self)
        return content.pop("splits") | content


@torch.no_grad()
def evaluate(
    path: Path,
    module: nn.Module,
    splits: Mapping[str, Data],
    *,
    batch_size: int = 256,
    progress: bool = False,
    description: str = "evaluate",
) -> Evaluation:
    """Evaluate all N points of a path on labelled data.

    Args:
        path: the path.
        module: the network of all points, run in eval mode; its parameter values are not used.
        splits: name -> (inputs [n, ...], labels [n] of 0 .. C - 1), or an iterable of such batches.
            The lengths are taken on the first split.
        batch_size: inputs in one pass, for splits given as tensors.
        progress: show a progress bar.
        description: its label.

    Raises:
        TypeError: a path or module of another type, or a batch that is not a pair of tensors.
        ValueError: a path that is not of this module, no data, inputs and labels whose counts
            differ, or labels that are not classes.

    Example:
        >>> evaluate(path, module, {"test": (images, labels)}).splits["test"].barrier
        0.0123
    """
    check_path_of(path, module)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not splits:
        raise ValueError("splits must name at least one set of inputs and labels, got none")
    network = stack(module)
    stacked = path.stacked()
    results, lengths = {}, None
    for name, data in splits.items():
        totals = _Totals(len(path), path.device)
        for batch in tqdm(
            _batches(name, data, batch_size),
            desc=f"{description} {name}",
            unit="batch",
            disable=not progress,
        ):
            inputs, labels = _pair(name, batch)
            with evaluation_mode(module):
                logits = network(stacked, inputs.to(path.device))  # [N, B, C]
            _check_labels(name, labels, logits)
            totals.add(logits, labels.to(path.device).long(), lengths=lengths is None)
        if totals.count == 0:
            raise ValueError(f"split {name!r} holds no data")
        results[name] = totals.split()
        lengths = lengths or totals.lengths()
    return Evaluation(results, euclidean=path.euclidean().sum().item(), **lengths)


class _Totals:
    """Sums over the inputs of one split, in float64."""

    def __init__(self, points: int, device: torch.device):
        self.count = 0
        zeros = torch.zeros(points, dtype=torch.float64, device=device)
        self.loss, self.correct = zeros, zeros
        self.js_div, self.square_distance = zeros[1:], zeros[1:]
        self.square_chord = 0.0

    def add(self, logits: Tensor, labels: Tensor, *, lengths: bool) -> None:
        """logits [N, B, C], labels [B]."""
        every_label = labels.expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), every_label.flatten(), reduction="none")
        self.count += len(labels)
        self.loss = self.loss + loss.view_as(every_label).sum(1, dtype=torch.float64)
        self.correct = self.correct + (logits.argmax(-1) == labels).sum(1)
        if lengths:
            js_div = path_js_div(logits, reduction="none")
            distance = path_fisher_rao(logits, reduction="none").double()
            chord = path_fisher_rao(logits[[0, -1]], reduction="none").double()
            self.js_div = self.js_div + js_div.sum(1, dtype=torch.float64)
            self.square_distance = self.square_distance + distance.square().sum(1)
            self.square_chord += chord.square().sum().item()

    def split(self) -> SplitEvaluation:
        loss = self.loss / self.count
        line = torch.linspace(0, 1, len(loss), dtype=loss.dtype, device=loss.device)
        line = torch.lerp(loss[0], loss[-1], line)
        return SplitEvaluation(
            loss=loss.tolist(),
            accuracy=(self.correct / self.count).tolist(),
            barrier=(loss.max() - (loss[0] + loss[-1]) / 2).item(),
            barrier_above_line=(loss - line).max().item(),
        )

    def lengths(self) -> dict[str, float]:
        js_div = self.js_div / self.count
        return {
            "energy": js_div.sum().item(),
            "sqrt_jsd": js_div.sqrt().sum().item(),
            "fisher_rao": (self.square_distance / self.count).sqrt().sum().item(),
            "fisher_rao_lower_bound": math.sqrt(self.square_chord / self.count),
        }


def _batches(name: str, data: Data, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    if not isinstance(data, tuple):
        return data
    inputs, labels = _pair(name, data)
    if len(inputs) != len(labels):
        raise ValueError(f"split {name!r} has {len(inputs)} inputs and {len(labels)} labels")
    return list(zip(inputs.split(batch_size), labels.split(batch_size), strict=True))


def _pair(name: str, batch: Sequence[Tensor]) -> Sequence[Tensor]:
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not pair or not all(map(torch.is_tensor, batch)):
        raise TypeError(
            f"split {name!r} must be a tuple (inputs, labels) or an iterable of such tuples"
        )
    return batch


def _check_labels(name: str, labels: Tensor, logits: Tensor) -> None:
    """ValueError unless labels [B] are classes of logits [N, B, C]."""
    if logits.ndim != 3:
        raise ValueError(f"the module must return logits [B, C], got {list(logits.shape[1:])}")
    batch, classes = logits.shape[1:]
    if labels.shape != (batch,) or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"split {name!r}: labels must be integers [{batch}], got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"split {name!r}: labels must be within 0..{classes - 1}, got {int(labels.min())}.."
            f"{int(labels.max())}"
        )
