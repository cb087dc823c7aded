"""What is looked at before a run begins or goes on: settings that cannot work are refused early."""

import os
from dataclasses import replace

import torch

from fastgeo.app.company import shape_of
from fastgeo.app.given import Given
from fastgeo.data.inputs import arguments, on_device
from fastgeo.data.loaders import LoaderData
from fastgeo.data.outputs import label_rows, logits_in, logits_of, rows_that_count
from fastgeo.forward.modes import refuse_batch_norm
from fastgeo.forward.options import size_of
from fastgeo.path import check_buffers
from fastgeo.stacking.module import StackedModule
from fastgeo.step.memory import ROOM, free_bytes, path_work, step_memory
from fastgeo.train import training_steps

CPU = torch.device("cpu")


def check(given: Given) -> None:
    """ValueError if the settings do not fit the data, the network or the machine."""
    c = given.config
    module = given.module.eval()
    if c.forward.batchnorm == "refuse":
        refuse_batch_norm(module)
    if c.ends.files:
        a, b = given.weights()
        if c.forward.batchnorm == "refuse":
            check_buffers(a, b, module)
    else:
        training_steps(given.dataset, c.training)
    _forward(given)
    if c.path.cuda_graph:
        _graph(given)
    _memory(given)


@torch.no_grad()
def _forward(given: Given) -> None:
    """ValueError unless the network gives logits for the data's inputs, and labels fit them."""
    model, data, how = given.config.ends.model, given.config.data.data, given.config.forward
    inputs, labels = next(iter(given.dataset.in_order("train", 2)))
    inputs = on_device(inputs, CPU)
    try:
        args, kwargs = arguments(given.module, inputs)
        outputs = given.module(*args, **kwargs)
    except Exception as error:
        raise ValueError(
            f"model {model} cannot be evaluated on inputs of {data}: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        logits = logits_in(outputs, how.output)[None]
        logits_of(logits)
        label_rows(f"data {data}", labels.cpu(), logits, rows_that_count(inputs, None, how.mask))
    except TypeError as error:
        raise ValueError(f"model {model}: {error}") from error


@torch.no_grad()
def _graph(given: Given) -> None:
    """ValueError if the step of this network cannot be captured."""
    module, kind = given.module, type(given.module).__name__
    network = StackedModule(module, engine="stacked", precision=given.config.forward.precision)
    inputs, _ = next(iter(given.dataset.in_order("train", 2)))
    params = {name: torch.stack([t, t]) for name, t in module.state_dict().items()}
    try:
        network(params, on_device(inputs, CPU))
    except ValueError as error:
        why = error.__cause__ or error
        raise ValueError(f"{kind} cannot be stacked: {why}; leave out --cuda-graph") from error
    for line in network.reads():
        raise ValueError(
            f"{kind} reads numbers back from the device, {line}; leave out --cuda-graph"
        )


def _memory(given: Given) -> None:
    """ValueError, naming the chunk that would fit, if a step will find too little memory."""
    c, how, free = given.config, given.config.forward, free_bytes(given.device)
    if free is None or how.memory_budget is not None:
        return
    inputs, labels = next(iter(given.dataset.in_order("train", 8)))
    inputs = on_device(inputs, CPU)
    network = StackedModule(
        given.module, engine=how.engine, batchnorm="recalibrate", output=how.output
    )
    params = {name: tensor[None] for name, tensor in given.module.state_dict().items()}
    own = isinstance(given.dataset, LoaderData)
    points, batch_size = c.path.points, c.path.batch_size
    along, over = shape_of(c)
    rows, at_once = -(-batch_size // over), -(-(c.descent.nodes or points - 2) // along)
    steps = {
        "training": ("training", c.training.train_batch_size, c.ends.count, False, True),
        "optimisation": (path_work(c.descent.momentum), rows, at_once, True, True),
        "evaluation": ("evaluation", c.evaluation.eval_batch_size, points, False, False),
    }
    if c.ends.files:
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
        need = replace(need, room=ROOM[given.device.type], kept=kept)
        finds = how.engine == "auto" and not (c.path.cuda_graph and what == "optimisation")
        chunk = 1 if how.chunk is None and finds else how.chunk  # auto finds one
        peak = need.peak(networks, chunk, streamed=streamed)
        left = free
        if along * over > 1 and streamed and given.device.type == "cpu":
            left //= int(os.environ["LOCAL_WORLD_SIZE"])  # which do so at once
        if peak > left:
            fits = need.fitting(networks, left, streamed=streamed)
            advice = "smaller batches" if fits is None else f"--chunk {fits}"
            raise ValueError(
                f"a step of the {what} would take about {size_of(peak)}, and {size_of(left)} "
                f"are free on {given.device}; give {advice}"
            )
