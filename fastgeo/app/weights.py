"""States of networks in the files that people have: by torch, by safetensors, whole or in parts."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path as FilePath

from torch import Tensor, nn
from tqdm import tqdm

from fastgeo.path import check_numbers, check_tied
from fastgeo.store.weights import read_weights

State = dict[str, Tensor]
KEYS = ("state_dict", "model_state_dict", "model_state", "model", "net")  # of checkpoints
OUTER = ("module.", "model.", "net.")  # DataParallel and averages, Lightning, and by hand
INNER = re.compile(r"(?<![^.])_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")


def read_state(file: str, module: nn.Module) -> State:
    """The state of a module from a file.

    Args:
        file: safetensors, or what `torch.save` wrote of a state dict: by itself or under a key that
            is usual (`KEYS`); or an index of several such files, or a folder of `save_pretrained`.
            What wrappers put in front of names (DataParallel, torch.compile, Lightning, averages)
            is taken off where all names fit then, and a line says so. Nothing in it is executed.
            FILE#a, FILE#b, ... are ends of a run.
        module: of which it must be a state; its own values of buffers that the file lacks are kept.

    Raises:
        ValueError: a missing, damaged or refused file, or one of another module.
    """
    name, _, end = file.partition("#")
    state = read_weights(FilePath(name).expanduser())
    while isinstance(state, Mapping) and (inside := _within(state)) is not None:
        state = inside
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file} holds no state dict (names and tensors)")
    state = {
        key: value
        for key, value in state.items()
        if key != "n_averaged" and not key.endswith("_extra_state")
    }
    try:
        check_numbers(file, state)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if end:
        own_names = [key for key in state if key.startswith(f"{end}/")]
        if not own_names:
            raise ValueError(f"{file}: there is no {end} in that file")
        state = {key.removeprefix(f"{end}/"): state[key] for key in own_names}
    own = module.state_dict()
    ends = sorted({key.partition("/")[0] for key in state if "/" in key})
    if ends and not any(key in own for key in state):
        several = " or ".join(f"{file}#{one}" for one in ends)
        raise ValueError(f"{file} holds several networks; name one of them: {several}")
    return _fitted(file, _unwrapped(file, state, own), module)


def _within(content: Mapping) -> Mapping | None:
    """The state dict within a checkpoint; None if it is one itself."""
    return next((content[key] for key in KEYS if isinstance(content.get(key), Mapping)), None)


def _unwrapped(file: str, state: State, own: Mapping[str, Tensor]) -> State:
    """The state without what wrappers put into its names, if these are the module's then."""

    def fit(names: Mapping) -> bool:
        return all(name in own for name in names)

    found, removed = state, []
    if not fit(found) and any(INNER.search(name) for name in found):
        removed = sorted({part[0] for name in found for part in INNER.finditer(name)})
        found = {INNER.sub("", name): tensor for name, tensor in found.items()}
    while not fit(found):
        prefix = next((p for p in OUTER if all(name.startswith(p) for name in found)), None)
        if prefix is None:
            return state
        removed.append(prefix)
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    if removed:
        tqdm.write(f"{file}: names are taken without {', '.join(removed)}", file=sys.stderr)
    return found


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
