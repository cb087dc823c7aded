"""What the settings of a run name: the device, the data, the network, files of weights.

The data and the network may be functions of the user's own modules.
"""

import functools
import importlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import nn

from fastgeo import data, models
from fastgeo.app.config import Config
from fastgeo.app.weights import State, read_state
from fastgeo.data.images import Dataset
from fastgeo.data.inputs import tensors_of
from fastgeo.data.loaders import LoaderData, loader_data
from fastgeo.data.text import Text, load_text, text_files


class Given:
    """What the settings name, each made once, when it is first asked for.

    Every attribute raises a ValueError where there is no such thing or it does not fit.

    Attributes:
        config: the settings.
    """

    def __init__(self, config: Config):
        self.config = config

    @functools.cached_property
    def device(self) -> torch.device:
        """The device, which can be used."""
        name = self.config.device
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

    @functools.cached_property
    def dataset(self) -> Dataset | Text | LoaderData:
        """The data, on the device, large enough for the batches."""
        c = self.config.data
        if is_function(c.data):
            try:
                return loader_data(_called("data", c.data)).to(self.device)
            except ValueError as error:
                raise ValueError(f"data {c.data}: {error}") from error
        found = self._text() or data.load(
            c.data, root=c.data_root, augment=c.augment, train_subset=c.train_subset
        )
        sizes = {
            "train_batch_size": self.config.training.train_batch_size,
            "batch_size": self.config.path.batch_size,
        }
        for name, size in sizes.items():
            if size > found.training_inputs:
                raise ValueError(
                    f"{name} {size} is larger than the data set: {found.training_size} of {c.data}"
                )
        return found.to(self.device)

    def _text(self) -> Text | None:
        """The text that the data are, if they are one."""
        c = self.config.data
        if not c.data.startswith("text:"):
            return None
        own = functools.partial(_called, "tokens", c.tokens)
        tokens = own if is_function(c.tokens) else c.tokens
        return load_text(
            c.data.removeprefix("text:"),
            block_size=c.block_size,
            tokens=tokens,
            train_subset=c.train_subset,
        )

    @property
    def data_files(self) -> list[FilePath]:
        """The files that the data are read from, in order; none of other data."""
        kind, _, name = self.config.data.data.partition(":")
        if kind == "text":
            return text_files(name)
        return [FilePath(name)] if kind == "npz" else []

    @functools.cached_property
    def batch_size(self) -> int:
        """Inputs in an optimisation step; of a user's own loader, those in its first batch."""
        if not isinstance(self.dataset, LoaderData):
            return self.config.path.batch_size
        inputs, _ = next(iter(self.dataset.in_order("train", 1)))
        return len(tensors_of(inputs)[0])

    @functools.cached_property
    def module(self) -> nn.Module:
        """The network, for all that needs no weights of its own in it."""
        return self.new_module()

    def new_module(self) -> nn.Module:
        """A freshly initialised network for the data."""
        c = self.config.ends
        if is_function(c.model):
            module = _called("model", c.model)
            if not isinstance(module, nn.Module):
                raise ValueError(
                    f"model {c.model} must return an nn.Module, got {type(module).__name__}"
                )
            return module
        depth = re.fullmatch(r"resnet(\d+)", c.model)
        if c.model not in ("mlp", "gpt") and not depth:
            raise ValueError(
                "model must be resnet8, resnet14, resnet20, ..., mlp or gpt, or a function that "
                f"returns an nn.Module as PACKAGE.MODULE:FUNCTION, got {c.model!r}"
            )
        there, norm = self.dataset, "rms" if c.norm == "rms" else "layer"
        if isinstance(there, Text) and c.model == "gpt":
            return models.gpt(there.num_classes, there.block_size, c.depth, c.width, norm=norm)
        if not isinstance(there, Dataset) or c.model == "gpt":
            images = "the data sets of images that have a name here (gpt is for text)"
            raise ValueError(
                f"model {c.model} is for {'text' if c.model == 'gpt' else images}; for other data, "
                "give one of your own by --model PACKAGE.MODULE:FUNCTION"
            )
        (channels, height, width), classes = there.image_shape, there.num_classes
        if not depth:
            hidden = max(1, round(512 * c.width))
            return models.mlp(channels * height * width, (hidden,) * 3, classes)
        return models.resnet(
            int(depth[1]), c.width, in_channels=channels, num_classes=classes, norm=c.norm
        )

    def weights(self) -> list[State]:
        """The states of a and b in the files that are given; none if they are to be trained."""
        return [self.state(file) for file in self.config.ends.files or ()]

    def state(self, file: str | FilePath) -> State:
        """A state of the network in a file, on the device."""
        state = read_state(str(file), self.module)
        return {name: tensor.to(self.device) for name, tensor in state.items()}


def is_function(name: str) -> bool:
    """Whether a setting names a function, PACKAGE.MODULE:FUNCTION."""
    module, colon, function = name.partition(":")
    words = f"{module}.{function}".split(".")
    own = bool(colon) and module not in ("npz", "text")
    return own and all(word.isidentifier() for word in words)


def with_absolute_files(config: Config) -> Config:
    """The same files named from the root: later stages may start from another folder."""

    def absolute(file: str) -> str:
        return str(FilePath(file).expanduser().absolute())

    a, b = map(absolute, config.ends.files) if config.ends.files else (None, None)
    data = config.data.data
    if config.data.file is not None:
        data = f"{data.partition(':')[0]}:{absolute(config.data.file)}"
    return config.changed(a=a, b=b, data=data)


def _called(setting: str, name: str, *arguments: Any) -> Any:
    """What a function of the user's returns."""
    try:
        return _function(name)(*arguments)
    except Exception as error:
        raise ValueError(
            f"{setting} {name} cannot be used: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _function(name: str) -> Callable[..., Any]:
    """An attribute of a module; the current folder is searched, as by `python -m`."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attributes = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    if not callable(found):
        raise TypeError(f"it is of type {type(found).__name__} and cannot be called")
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
