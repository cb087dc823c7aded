"""Weights in the files that people have: by torch, by safetensors, and folders of transformers."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastgeo.store.files import replacing

IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # as `save_pretrained` writes them
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")


def read_weights(path: FilePath) -> Any:
    """What a file holds, an index's parts together."""
    if path.is_dir():
        there = [path / f"{name}{index}" for name in IN_FOLDERS for index in ("", ".index.json")]
        found = next((file for file in there if file.is_file()), None)
        if found is None:
            names = " and no ".join(IN_FOLDERS)
            raise ValueError(f"cannot read {path}: it is a folder with no {names} in it")
        path = found
    try:
        with open(path, "rb") as stream:
            begin = stream.read(512)
        if reason := _no_weights(begin):
            raise ValueError(reason)
        if begin[:1] == b"{":
            return _parts(path)
        if begin[8:9] == b"{":  # behind the length of its header
            return safetensors.torch.load_file(path)
        with open(path, "rb") as stream:  # by what it is, and not by its name
            return torch.load(stream, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {path}: there is no such file") from error
    except Exception as error:  # noqa: BLE001 - torch.load and its unpickler raise what they like
        reason = (str(error) or type(error).__name__).splitlines()[0].removesuffix(".")
        if "weights_only" in str(error) or "Weights only" in str(error):
            reason = (
                "it holds more than tensors, which could run code; save the state dict by itself: "
                "torch.save(module.state_dict(), file)"
            )
        raise ValueError(f"cannot read {path}: {reason}") from error


def _no_weights(begin: bytes) -> str:
    """Why a file that begins like this holds no weights; empty if it may."""
    if not begin:
        return "it is empty"
    if begin.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, which stands for the weights; fetch them: git lfs pull"
    if begin.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "it is an HTML page and no weights, as a download gives that was refused"
    if begin[8:9] != b"{" and begin[:1] not in (b"{", b"P", b"\x80"):
        return "it is neither safetensors nor what torch.save writes"
    return ""


def _parts(index: FilePath) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    content = json.loads(index.read_text(encoding="utf-8"))
    if "weight_map" not in content:
        raise ValueError("it is JSON and no index of weights (it has no weight_map)")
    state: dict[str, Tensor] = {}
    for name in sorted(set(content["weight_map"].values())):
        state |= read_weights(index.parent / name)
    if lacking := content["weight_map"].keys() - state.keys():
        raise ValueError(f"its parts lack {min(lacking)}")
    return state


def write_pretrained(folder: FilePath, state: Mapping[str, Tensor], like: FilePath) -> None:
    """Weights as a folder of `save_pretrained`, with all files of another one but its weights.

    Args:
        folder: a new or an empty one.
        state: names and values of the weights.
        like: the other folder; weights get the types that they have there. Those that are not there
            must be tied to one that is.

    Raises:
        ValueError: `folder` is not empty, `like` cannot be read, or weights differ from its own in
            name or shape.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and is no empty folder; name a new one")
    if not (like / "config.json").is_file():
        raise ValueError(f"{like} is no folder of save_pretrained: it has no config.json")
    weights = _typed(state, read_weights(like), like)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / IN_FOLDERS[0]) as temporary:
        safetensors.torch.save_file(weights, temporary, {"format": "pt"})
    for file in sorted(like.iterdir()):
        index = file.name.endswith(".index.json")
        if file.is_file() and file.suffix not in WEIGHTS and not index:
            with replacing(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)


def _typed(
    state: Mapping[str, Tensor], there: Mapping[str, Tensor], like: FilePath
) -> dict[str, Tensor]:
    """Those of a state that are there, with the types that they have there."""
    for name in there:
        if name not in state:
            raise ValueError(f"{like} holds {name}, which the path does not have")
        if state[name].shape != there[name].shape:
            raise ValueError(
                f"{name} has shape {list(there[name].shape)} in {like} and "
                f"{list(state[name].shape)} in the path"
            )
    kept = [state[name] for name in there]
    for name, tensor in state.items():
        if name not in there and not any(torch.equal(tensor, other) for other in kept):
            raise ValueError(f"{like} lacks {name}, which is tied to no weight that it holds")
    return {name: state[name].to("cpu", own.dtype, copy=True) for name, own in there.items()}
