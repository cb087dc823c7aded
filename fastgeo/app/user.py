"""What a user names on the command line: functions of their modules, and files of weights."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastgeo.data.loaders import LoaderData, loader_data


def is_function(name: str) -> bool:
    """Whether a setting names a function, PACKAGE.MODULE:FUNCTION."""
    module, colon, function = name.partition(":")
    words = f"{module}.{function}".split(".")
    return bool(colon) and module != "npz" and all(word.isidentifier() for word in words)


def new_module(name: str) -> nn.Module:
    """What PACKAGE.MODULE:FUNCTION returns, a network.

    Raises:
        ValueError: no such function, one that fails, or that returns something else.
    """
    module = _call("model", name)
    if not isinstance(module, nn.Module):
        raise ValueError(f"model {name} must return an nn.Module, got {type(module).__name__}")
    return module


def data(name: str) -> LoaderData:
    """What PACKAGE.MODULE:FUNCTION returns, (train, test).

    Raises:
        ValueError: no such function, one that fails, or that returns something else.
    """
    try:
        return loader_data(_call("data", name))
    except ValueError as error:
        raise ValueError(f"data {name}: {error}") from error


def _call(setting: str, name: str) -> Any:
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
    found = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    if not callable(found):
        raise TypeError(f"it is a {type(found).__name__}, not a function")
    return found


def read_state(file: str, module: nn.Module) -> dict[str, Tensor]:
    """The state of a module from a file.

    Args:
        file: .safetensors, or what `torch.save` wrote of a state dict: by itself or under the key
            "state_dict", "model_state_dict" or "model"; names may begin with "module." (of a
            DataParallel) and "_orig_mod." (of torch.compile). Nothing in it is executed.
        module: of which it must be a state; its own values of buffers that the file lacks are kept.

    Raises:
        ValueError: a missing, damaged or refused file, or one of another module.
    """
    path = FilePath(file).expanduser()
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
    own = module.state_dict()
    for prefix in ("module.", "_orig_mod.", "module."):  # one of them around the other, too
        if all(name.startswith(prefix) and name not in own for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return _fitted(file, state, module)


def _fitted(file: str, state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The state in the module's order and types; ValueError at the first name that differs."""
    own, buffers = module.state_dict(), {name for name, _ in module.named_buffers()}
    tied: dict[nn.Parameter, list[str]] = {}  # all names of each parameter
    for name, parameter in module.named_parameters(remove_duplicate=False):
        tied.setdefault(parameter, []).append(name)
    names = {name: names for names in tied.values() for name in names}
    for name in state:
        if name not in own:
            raise ValueError(f"{file} holds {name}, which the module does not have")
    fitted = {}
    for name, tensor in own.items():
        present = [other for other in (name, *names.get(name, ())) if other in state]
        given = state[present[0]] if present else None
        if given is None and name not in buffers:
            raise ValueError(f"{file} lacks {name}")
        given = tensor if given is None else given
        if given.shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {list(given.shape)} in {file} and {list(tensor.shape)} in the "
                "module"
            )
        fitted[name] = given.detach().to(tensor)
    return fitted


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
