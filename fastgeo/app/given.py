"""What the settings of a run name: the device, the data, the network, files of weights.

The data and the network may be functions of the user's own modules.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastgeo import data, models
from fastgeo.app.config import Config
from fastgeo.data.images import Dataset
from fastgeo.data.inputs import tensors_of
from fastgeo.data.loaders import LoaderData, loader_data
from fastgeo.path import check_tied

State = dict[str, Tensor]


class Given:
    """What the settings name, each made once, when it is first asked for.

    Every attribute raises a ValueError where there is no such thing or it does not fit.

    Attributes:
        config: the settings.
    """

    def __init__(self, config: Config):
        self.config = config

    @cached_property
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

    @cached_property
    def dataset(self) -> Dataset | LoaderData:
        """The data, on the device, large enough for the batches."""
        c = self.config.data
        if is_function(c.data):
            try:
                return loader_data(_called("data", c.data)).to(self.device)
            except ValueError as error:
                raise ValueError(f"data {c.data}: {error}") from error
        found = data.load(c.data, root=c.data_root, augment=c.augment, train_subset=c.train_subset)
        sizes = {
            "train_batch_size": self.config.training.train_batch_size,
            "batch_size": self.config.path.batch_size,
        }
        for name, size in sizes.items():
            if size > len(found.train.labels):
                raise ValueError(
                    f"{name} {size} is larger than the data set: "
                    f"{len(found.train.labels)} training images of {c.data}"
                )
        return found.to(self.device)

    @cached_property
    def batch_size(self) -> int:
        """Inputs in an optimisation step; of a user's own loader, those in its first batch."""
        if not isinstance(self.dataset, LoaderData):
            return self.config.path.batch_size
        inputs, _ = next(iter(self.dataset.in_order("train", 1)))
        return len(tensors_of(inputs)[0])

    @cached_property
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
        if c.model != "mlp" and not depth:
            raise ValueError(
                "model must be resnet8, resnet14, resnet20, ... or mlp, or a function that "
                f"returns an nn.Module as PACKAGE.MODULE:FUNCTION, got {c.model!r}"
            )
        if isinstance(self.dataset, LoaderData):
            raise ValueError(
                f"model {c.model} is for the data sets of images that have a name here; with "
                "loaders of your own, give a model of your own by --model PACKAGE.MODULE:FUNCTION"
            )
        (channels, height, width), classes = self.dataset.image_shape, self.dataset.num_classes
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
    return bool(colon) and module != "npz" and all(word.isidentifier() for word in words)


def with_absolute_files(config: Config) -> Config:
    """The same files named from the root: later stages may start from another folder."""

    def absolute(file: str) -> str:
        return str(FilePath(file).expanduser().absolute())

    a, b = map(absolute, config.ends.files) if config.ends.files else (None, None)
    kind, _, file = config.data.data.partition(":")
    data = f"npz:{absolute(file)}" if kind == "npz" else config.data.data
    return config.changed(a=a, b=b, data=data)


def _called(setting: str, name: str) -> Any:
    """What a function of the user's returns."""
    try:
        return _function(name)()
    except Exception as error:
        raise ValueError(
            f"{setting} {name} cannot be used: {type(error).__name__}: {_first_line(error)}"
        ) from error


def _function(name: str) -> Callable[[], Any]:
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


def read_state(file: str, module: nn.Module) -> State:
    """The state of a module from a file.

    Args:
        file: .safetensors, or what `torch.save` wrote of a state dict: by itself or under the key
            "state_dict", "model_state_dict" or "model"; names may begin with "module." (of a
            DataParallel) and "_orig_mod." (of torch.compile). Nothing in it is executed.
            FILE#a, FILE#b, ... are ends of a run.
        module: of which it must be a state; its own values of buffers that the file lacks are kept.

    Raises:
        ValueError: a missing, damaged or refused file, or one of another module.
    """
    name, _, end = file.partition("#")
    path = FilePath(name).expanduser()
    state: Any
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {file}: there is no such file") from error
    except Exception as error:  # noqa: BLE001 - torch.load and its unpickler raise what they like
        reason = _first_line(error).removesuffix(".")
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = (
                "it holds more than tensors, which could run code; save the state dict by itself: "
                "torch.save(module.state_dict(), file)"
            )
        raise ValueError(f"cannot read {file}: {reason}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(map(torch.is_tensor, state.values())):
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    if end:
        own_names = [name for name in state if name.startswith(f"{end}/")]
        if not own_names:
            raise ValueError(f"{file}: there is no {end} in that file")
        state = {name.removeprefix(f"{end}/"): state[name] for name in own_names}
    own = module.state_dict()
    ends = sorted({name.partition("/")[0] for name in state if "/" in name})
    if ends and not any(name in own for name in state):
        several = " or ".join(f"{file}#{one}" for one in ends)
        raise ValueError(f"{file} holds several networks; name one of them: {several}")
    for prefix in ("module.", "_orig_mod.", "module."):  # one of them around the other, too
        if all(name.startswith(prefix) and name not in own for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return _fitted(file, state, module)


def _fitted(file: str, state: Mapping[str, Tensor], module: nn.Module) -> State:
    """The state in the module's order and types; ValueError at the first name that differs."""
    own, buffers = module.state_dict(), {name for name, _ in module.named_buffers()}
    tied: dict[nn.Parameter, list[str]] = {}  # all names of each parameter
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    names = {name: names for names in tied.values() for name in names}
    for name in state:
        if name not in own:
            raise ValueError(f"{file} holds {name}, which the module does not have")
    check_tied(state, module, file)
    fitted = {}
    for name, tensor in own.items():
        present = [other for other in (name, *names.get(name, ())) if other in state]
        if not present and name not in buffers:
            raise ValueError(f"{file} lacks {name}")
        given = state[present[0]] if present else tensor
        if given.shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(given.shape)} in {file} and {list(tensor.shape)} in the "
                "module"
            )
        fitted[name] = given.detach().to(tensor, copy=True)
    return fitted


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
