"""What the settings of a run name: the device, the data, the network, files of weights."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path as FilePath

import torch
from torch import Tensor, nn

from fastgeo import data, models
from fastgeo.app import user
from fastgeo.app.config import Config, flag
from fastgeo.data.loaders import LoaderData


def device(config: Config) -> torch.device:
    """The device, which can be used."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise ValueError("fastgeo runs on cpu and cuda")
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used: {reason}") from error


def dataset(config: Config, device: torch.device) -> data.Dataset | LoaderData:
    """The data, on the device, large enough for the batches."""
    c = config
    if user.is_function(c.data):
        return user.data(c.data).to(device)
    dataset = data.load(c.data, root=c.data_root, augment=c.augment, train_subset=c.train_subset)
    for name in ("train_batch_size", "batch_size"):
        if getattr(c, name) > len(dataset.train.labels):
            raise ValueError(
                f"{flag(name)} {getattr(c, name)} is larger than the data set: "
                f"{len(dataset.train.labels)} training images of {c.data}"
            )
    return dataset.to(device)


def module(config: Config, read: Callable[[], data.Dataset | LoaderData]) -> nn.Module:
    """A freshly initialised network for the data, which are read only if it is of their size."""
    c = config
    if user.is_function(c.model):
        return user.new_module(c.model)
    depth = re.fullmatch(r"resnet(\d+)", c.model)
    if c.model != "mlp" and not depth:
        raise ValueError(
            "model must be resnet8, resnet14, resnet20, ... or mlp, or a function that "
            f"returns an nn.Module as PACKAGE.MODULE:FUNCTION, got {c.model!r}"
        )
    dataset = read()
    if isinstance(dataset, LoaderData):
        raise ValueError(f"model {c.model} fits images only; give your data's own model, too")
    (channels, height, width), classes = dataset.image_shape, dataset.num_classes
    if c.model == "mlp":
        hidden = max(1, round(512 * c.width))
        return models.mlp(channels * height * width, (hidden,) * 3, classes)
    return models.resnet(
        int(depth[1]), c.width, in_channels=channels, num_classes=classes, norm=c.norm
    )


def states(config: Config, module: nn.Module, device: torch.device) -> list[dict[str, Tensor]]:
    """The states of a and b in the files of weights."""
    return [
        {name: t.to(device) for name, t in user.read_state(file, module).items()}
        for file in (config.a, config.b)
    ]


def with_absolute_files(config: Config) -> Config:
    """Later stages may start from another folder."""
    changes = {
        name: str(FilePath(file).expanduser().absolute())
        for name in ("a", "b")
        if (file := getattr(config, name)) is not None
    }
    if config.data.startswith("npz:"):
        file = FilePath(config.data.removeprefix("npz:")).expanduser().absolute()
        changes["data"] = f"npz:{file}"
    return replace(config, **changes)
