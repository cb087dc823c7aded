"""What is looked at before a run begins or goes on: settings that cannot work are refused early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastgeo.data.inputs import arguments, on_device
from fastgeo.data.loaders import LoaderData
from fastgeo.data.outputs import label_rows, logits_in, logits_of, rows_that_count
from fastgeo.forward.modes import refuse_batch_norm
from fastgeo.forward.options import size_of
from fastgeo.stacking.module import StackedModule
from fastgeo.step.memory import ROOM, free_bytes, path_work, step_memory
from fastgeo.store.files import sha256_of
from fastgeo.train import training_steps

if TYPE_CHECKING:
    from fastgeo.app.folder import Run


def check(run: Run) -> None:
    """ValueError if the settings do not fit the data, the network or the machine, or the data are
    not what they were."""
    _data(run)
    module = run.new_module()
    if run.config.batchnorm == "refuse":
        refuse_batch_norm(module)
    if run.config.a is None:
        training_steps(run.dataset, run.config.training)
    else:
        run.given_ends()
    _forward(run, module)
    if run.config.cuda_graph:
        _graph(run, module)
    _memory(run, module)


def _data(run: Run) -> None:
    """ValueError if an npz is not what it was when the run was begun."""
    kind, _, file = run.config.data.partition(":")
    if kind != "npz":
        return
    found = sha256_of(FilePath(file))
    if run.data not in (None, found):
        raise ValueError(
            f"{file} is not what it was when {run.folder} was begun; bring that back, or "
            "begin anew in another folder"
        )
    run.data = found


@torch.no_grad()
def _graph(run: Run, module: nn.Module) -> None:
    """ValueError if the step of this network cannot be one on static buffers."""
    name = type(module).__name__
    network = StackedModule(module.eval(), engine="stacked", precision=run.config.precision)
    inputs, _ = next(iter(run.dataset.in_order("train", 2)))
    params = {name: torch.stack([t, t]) for name, t in module.state_dict().items()}
    try:
        network(params, on_device(inputs, torch.device("cpu")))
    except ValueError as error:
        why = error.__cause__ or error
        raise ValueError(f"{name} cannot be stacked: {why}; leave out --cuda-graph") from error
    for line in network.reads():
        raise ValueError(
            f"{name} reads numbers back from the device, {line}; leave out --cuda-graph"
        )


def _memory(run: Run, module: nn.Module) -> None:
    """ValueError, naming the chunk that would fit, if a step will find too little memory."""
    c, free = run.config, free_bytes(run.device)
    if free is None or c.memory_budget is not None:
        return
    inputs, labels = next(iter(run.dataset.in_order("train", 8)))
    inputs = on_device(inputs, torch.device("cpu"))
    network = StackedModule(
        module.eval(), engine=c.engine, batchnorm="recalibrate", output=c.output
    )
    params = {name: tensor[None] for name, tensor in module.state_dict().items()}
    own = isinstance(run.dataset, LoaderData)
    steps = {
        "training": ("training", c.train_batch_size, c.count, False, True),
        "optimisation": (path_work(c.momentum), c.batch_size, c.points - 2, True, True),
        "evaluation": ("evaluation", c.eval_batch_size, c.points, False, False),
    }
    if c.a is not None:
        del steps["training"]
    for what, (work, batch, networks, streamed, kept) in steps.items():
        need = step_memory(
            network,
            params,
            inputs,
            networks=networks,
            work=work,
            scale=1.0 if own else batch / len(labels),
        )
        need = replace(need, room=ROOM[run.device.type], kept=kept)
        finds = c.engine == "auto" and not (c.cuda_graph and what == "optimisation")
        chunk = 1 if c.chunk is None and finds else c.chunk  # auto finds one
        peak = need.peak(networks, chunk, streamed=streamed)
        if peak > free:
            fits = need.fitting(networks, free, streamed=streamed)
            advice = "smaller batches" if fits is None else f"--chunk {fits}"
            raise ValueError(
                f"a step of the {what} would take about {size_of(peak)}, and {size_of(free)} "
                f"are free on {run.device}; give {advice}"
            )


@torch.no_grad()
def _forward(run: Run, module: nn.Module) -> None:
    """ValueError unless the network gives logits for the data's inputs, and labels fit them."""
    c = run.config
    inputs, labels = next(iter(run.dataset.in_order("train", 2)))
    inputs = on_device(inputs, torch.device("cpu"))
    try:
        args, kwargs = arguments(module, inputs)
        outputs = module.eval()(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"model {c.model} cannot be evaluated on inputs of {c.data}: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        outputs = logits_in(outputs, c.output)[None]
        logits_of(outputs)
        label_rows(f"data {c.data}", labels.cpu(), outputs, rows_that_count(inputs, None, c.mask))
    except TypeError as error:
        raise ValueError(f"model {c.model}: {error}") from error
