"""Loss, accuracy, barriers and lengths of a path."""

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from fastgeo_kernels import path_fisher_rao, path_js_div
from torch import Tensor, nn
from tqdm import tqdm

from fastgeo import figures
from fastgeo.data.inputs import Inputs, each_tensor, is_inputs, on_device, tensors_of
from fastgeo.data.outputs import IGNORED, label_rows, rows_that_count
from fastgeo.forward.modes import evaluation_mode
from fastgeo.forward.options import Forward
from fastgeo.path import Path, check_buffers, check_path_of
from fastgeo.recalibrate import recalibrate
from fastgeo.step.engines import EngineChoice

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed.device_mesh import DeviceMesh

    from fastgeo.ranks.mesh import Ranks

Pair = tuple[Inputs, Tensor]
Data = Pair | Iterable[Pair]


@dataclass(frozen=True)
class SplitEvaluation:
    """One set of labelled inputs along the path.

    Attributes:
        loss: [N] mean cross-entropy of the rows that count, nats.
        accuracy: [N] share of them classified correctly.
        barrier: highest loss less the mean of the two ends, nats.
        barrier_above_line: highest excess of the loss of point i over the straight line between
            the losses of the ends at i / (N - 1), nats; 0 if no point is above it.
        mean: of the loss along arc length, nats: the integral over the length of the path, which
            is what curve finding lowers and reports (Garipov et al., "Loss Surfaces, Mode
            Connectivity, and Fast Ensembling of DNNs", 2018, equation 1).
        integral: of the loss along arc length, the Euclidean distance in weight space along the
            path, nats; by the trapezoid rule on the N points.
    """

    loss: list[float]
    accuracy: list[float]
    barrier: float
    barrier_above_line: float
    mean: float
    integral: float

    def __repr__(self) -> str:
        return (
            f"SplitEvaluation({len(self.loss)} points: highest loss {max(self.loss):.3f} nats, "
            f"mean {self.mean:.3f}, barrier {self.barrier:.3f}, above the line "
            f"{self.barrier_above_line:.3f}, lowest accuracy {100 * min(self.accuracy):.1f} %)"
        )


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

    def table(self) -> figures.Table:
        """Highest loss, barrier, lowest accuracy of each split, and the lengths, with their units;
        `print` shows it as text."""
        return figures.summary(self.to_json())

    def plot(
        self,
        others: Mapping[str, "Evaluation"] | None = None,
        *,
        name: str = "path",
        title: str = "",
    ) -> "Figure":
        """Loss and accuracy along the path as a matplotlib figure, which a notebook shows.

        Args:
            others: further paths by their names, drawn in the same figure.
            name: of this path, beside them.
            title: above the figure.
        """
        paths = {name: self, **(others or {})}
        return figures.compare(paths).plot(title=title)

    def __repr__(self) -> str:
        points = len(next(iter(self.splits.values())).loss)
        return f"Evaluation of {points} points\n{self.table()}"

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


@torch.no_grad()
def evaluate(
    path: Path,
    module: nn.Module,
    splits: Mapping[str, Data] | Data,
    *,
    batch_size: int = 256,
    forward: Forward = Forward(),
    on_choice: Callable[[dict], None] | None = None,
    progress: bool = False,
    description: str = "evaluate",
    mesh: "DeviceMesh | None" = None,
) -> Evaluation:
    """Evaluate all N points of a path on labelled data.

    Args:
        path: the path.
        module: the network of all points, run in eval mode; its parameter values are not used.
        splits: name -> (inputs, labels), or an iterable of such batches. Inputs are [n, ...], or
            any mapping of such tensors and other values, as in `fastgeo.optimize`: labels in it are
            dropped unread. The labels beside it are integers within 0 .. C - 1, [n], or [n, ...]
            for logits [n, ..., C], or -100 where a row does not count. The lengths are taken on the
            first split. One such set by itself, a loader for one, is called "data".
        batch_size: inputs in one pass, for splits given as tensors.
        forward: engine, chunk, precision and the like (`fastgeo.Forward`). Losses, accuracies and
            lengths are means over the rows that count. With batchnorm="recalibrate" the running
            statistics of every network are computed anew on the first split
            (`fastgeo.recalibrate`), on the path that is evaluated only.
        on_choice: as in `fastgeo.optimize`.
        progress: show a progress bar.
        description: its label.
        mesh: as in `fastgeo.optimize`: all of its ranks call this alike, with the whole path. They
            take the batches in turn, and all return what one process does, up to rounding.

    Raises:
        TypeError: a path or module of another type, a batch that is not such a pair, or no logits
            in what the module returns.
        ValueError: a path that is not of this module, no data or no row that counts, inputs and
            labels whose counts differ, or labels that are not classes.

    Example:
        >>> evaluate(path, module, loader).splits["data"].barrier
        0.0123
        >>> evaluate(path, module, {"train": (images, labels), "test": loader}).table()
    """
    module = check_path_of(path, module)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not isinstance(splits, Mapping):
        splits = {"data": splits}
    if not splits:
        raise ValueError("splits must name at least one set of inputs and labels, got none")
    choice = EngineChoice(module, forward, work="evaluation", on_choice=on_choice)
    if forward.batchnorm == "recalibrate":
        name, data = next(iter(splits.items()))
        unlabelled = (_pair(name, batch)[0] for batch in _batches(name, data, batch_size))
        path = recalibrate(path, module, unlabelled, forward=forward)
    else:
        check_buffers(path.start, path.end, module, interpolated=path.interpolated)
    ranks = None if mesh is None else _ranks(mesh)
    stacked, steps = path.stacked(), path.euclidean().double()
    one = {name: tensor[:1] for name, tensor in stacked.items()}
    results: dict[str, SplitEvaluation] = {}
    lengths: dict[str, float] = {}
    for name, data in splits.items():
        totals, batch = _Totals(len(path), path.device), None
        batches = _batches(name, data, batch_size)
        if ranks is not None:
            batches = ranks.in_turn(batches)
        for batch in tqdm(
            batches,
            desc=f"{description} {name}",
            unit="batch",
            disable=not progress,
        ):
            inputs, labels = _pair(name, batch)
            inputs = on_device(inputs, path.device)
            with evaluation_mode(module):
                choice.prepare(one, inputs, points=len(path))
                logits = choice.run(lambda engine: engine.logits(stacked, inputs))  # noqa: B023
            counted, labels = rows_that_count(inputs, None, forward.mask), labels.to(path.device)
            rows = label_rows(f"split {name!r}", labels, logits.like, counted)
            for part in logits.slices():
                totals.add(logits.of(part), rows[part], lengths=not lengths)
        if ranks is not None:
            totals.add_up(ranks)
        if totals.count == 0:
            what = "no data" if batch is None else "no row that counts"
            raise ValueError(f"split {name!r} holds {what}")
        results[name] = totals.split(steps)
        lengths = lengths or totals.lengths()
    choice.finish()
    return Evaluation(results, euclidean=steps.sum().item(), **lengths)


class _Totals:
    """Sums over the rows of one split that count, in float64."""

    def __init__(self, points: int, device: torch.device):
        self.count = 0
        zeros = torch.zeros(points, dtype=torch.float64, device=device)
        self.loss, self.correct = zeros, zeros
        self.js_div, self.square_distance = zeros[1:], zeros[1:]
        self.square_chord = 0.0

    def add(self, logits: Tensor, labels: Tensor, *, lengths: bool) -> None:
        """logits [N, R, C], labels [R], -100 where a row does not count."""
        counted = labels != IGNORED
        every_label = labels.expand(len(logits), -1)
        loss = F.cross_entropy(logits.flatten(0, 1), every_label.flatten(), reduction="none")
        self.count += int(counted.sum())
        self.loss = self.loss + loss.view_as(every_label).sum(1, dtype=torch.float64)
        self.correct = self.correct + (logits.argmax(-1) == labels).sum(1)
        if lengths:
            js_div = path_js_div(logits, reduction="none").where(counted, 0)
            distance = path_fisher_rao(logits, reduction="none").double().where(counted, 0)
            chord = path_fisher_rao(logits[[0, -1]], reduction="none").double().where(counted, 0)
            self.js_div = self.js_div + js_div.sum(1, dtype=torch.float64)
            self.square_distance = self.square_distance + distance.square().sum(1)
            self.square_chord += chord.square().sum().item()

    def add_up(self, ranks: "Ranks") -> None:
        """Those of all ranks."""
        along = [self.loss, self.correct, self.js_div, self.square_distance]
        whole = torch.cat([*along, self.loss.new_tensor([self.count, self.square_chord])])
        ranks.add_up(whole)
        sizes = [len(one) for one in along]
        self.loss, self.correct, self.js_div, self.square_distance, rest = whole.split([*sizes, 2])
        self.count, self.square_chord = int(rest[0]), rest[1].item()

    def split(self, steps: Tensor) -> SplitEvaluation:
        """steps [E], the Euclidean lengths of the edges."""
        loss = self.loss / self.count
        integral, length = ((loss[1:] + loss[:-1]) / 2 * steps).sum(), steps.sum()
        line = torch.linspace(0, 1, len(loss), dtype=loss.dtype, device=loss.device)
        line = torch.lerp(loss[0], loss[-1], line)
        return SplitEvaluation(
            loss=loss.tolist(),
            accuracy=(self.correct / self.count).tolist(),
            barrier=(loss.max() - (loss[0] + loss[-1]) / 2).item(),
            barrier_above_line=(loss - line).max().item(),
            mean=(integral / length if length else loss[0]).item(),
            integral=integral.item(),
        )

    def lengths(self) -> dict[str, float]:
        js_div = self.js_div / self.count
        return {
            "energy": js_div.sum().item(),
            "sqrt_jsd": js_div.sqrt().sum().item(),
            "fisher_rao": (self.square_distance / self.count).sqrt().sum().item(),
            "fisher_rao_lower_bound": math.sqrt(self.square_chord / self.count),
        }


def _ranks(mesh: "DeviceMesh") -> "Ranks":
    from fastgeo.ranks.mesh import Ranks  # what one process needs not

    return Ranks(mesh)


def _batches(name: str, data: Data, batch_size: int) -> Iterable[Pair]:
    if not isinstance(data, tuple):
        return data
    inputs, labels = _pair(name, data)
    for tensor in tensors_of(inputs):
        if len(tensor) != len(labels):
            raise ValueError(f"split {name!r} has {len(tensor)} inputs and {len(labels)} labels")
    parts = [slice(i, i + batch_size) for i in range(0, len(labels), batch_size)]
    return [(each_tensor(operator.itemgetter(part), inputs), labels[part]) for part in parts]


def _pair(name: str, batch: Sequence) -> Sequence:
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if not pair or not is_inputs(batch[0]) or not isinstance(batch[1], Tensor):
        raise TypeError(
            f"split {name!r} must be a tuple (inputs, labels) of tensors, inputs also a mapping of "
            "them, or an iterable of such tuples; labels within a mapping are not read"
        )
    return batch
