"""Running statistics of BatchNorm for every network on a path, computed from data."""

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from fastgeo.data.inputs import Passes, on_device
from fastgeo.forward.modes import batch_norms, batch_statistics, tracking_instance_norm
from fastgeo.forward.options import Forward
from fastgeo.path import Path, check_path_of
from fastgeo.stacking.module import stack
from fastgeo.step.engines import Engine

STATISTICS = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}


@torch.no_grad()
def recalibrate(
    path: Path,
    module: nn.Module,
    batches: Iterable,
    *,
    forward: Forward = Forward(),
    progress: bool = False,
) -> Path:
    """The same path with the running statistics of every network, ends included, from data.

    A network between two others has features of its own, whose means and variances are not between
    theirs: with interpolated statistics it would be worse than it is. Every mean and variance
    becomes the average over the batches, as with `torch.optim.swa_utils.update_bn` for each network
    and in the curve finding of Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast
    Ensembling of DNNs" (2018). Weights do not change.

    Args:
        path: made with `Path.linear(..., batchnorm="recalibrate")`.
        module: the network of all points; its BatchNorm layers must track statistics.
        batches: one pass over inputs, as in `fastgeo.optimize`; training data, usually.
        forward: of which chunk and output matter here.
        progress: show a progress bar.

    Raises:
        TypeError, ValueError: as in `fastgeo.optimize`; a module without such layers, or no batch.

    Example:
        >>> path = optimize(path, module, batches, forward=Forward(batchnorm="recalibrate"))
        >>> path = recalibrate(path, module, batches)
    """
    check_path_of(path, module)
    names = [f"{layer}.{name}".lstrip(".") for layer in batch_norms(module) for name in STATISTICS]
    names = [name for name in names if name in path.start]
    if other := tracking_instance_norm(module):
        raise ValueError(
            f"layer {other} is InstanceNorm with running statistics, which cannot be recalibrated; "
            "make it with track_running_stats=False and train again"
        )
    if not names:
        raise ValueError("the module has no BatchNorm with running statistics to recalibrate")
    stacked = path.stacked()
    for name in names:
        start = STATISTICS[name.rpartition(".")[2]]
        stacked[name] = torch.full_like(stacked[name], start, memory_format=torch.contiguous_format)
    network = stack(module, batchnorm="recalibrate", output=forward.output)
    engine = Engine(network, forward.chunk)
    seen = 0
    for given, _ in tqdm(
        Passes(batches, repeat=False),
        desc="recalibrate",
        unit="batch",
        disable=not progress,
    ):
        inputs = on_device(given, path.device)
        # The first batch also without updates: an engine that gives way must not leave any behind.
        for update in (False, True) if seen == 0 else (True,):
            with batch_statistics(module, update=update):
                engine.forward(stacked, inputs)
        seen += 1
    if not seen:
        raise ValueError("batches must hold at least one batch of inputs")
    start, interior, end = dict(path.start), dict(path.interior), dict(path.end)
    for name in names:
        start[name], *_, end[name] = stacked[name].unbind(0)
        if name in interior:
            interior[name] = stacked[name][1:-1]
    return Path(start, interior, end)
