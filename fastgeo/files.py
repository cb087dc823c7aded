"""What fastgeo writes and reads: JSON and safetensors, whole or not at all, never pickle."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from matplotlib.figure import Figure
from torch import Tensor

SCHEMA = 1


def write_bytes(file: FilePath, content: bytes) -> None:
    """Write to a temporary name in the same folder, flush, rename."""
    temporary = file.with_name(f".{file.name}.part")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def write_figure(file: FilePath, figure: Figure) -> None:
    """A matplotlib figure as PNG."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    write_bytes(file, content.getvalue())


def write_json(file: FilePath, content: Mapping[str, Any]) -> None:
    """JSON with its schema version in front."""
    text = json.dumps({"schema": SCHEMA, **content}, indent=1, ensure_ascii=False)
    write_bytes(file, f"{text}\n".encode())


def read_json(file: FilePath) -> dict[str, Any]:
    """The content that `write_json` was given.

    Raises:
        ValueError: a missing or damaged file, or a newer schema.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        schema = content.pop("schema")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot read {file}: {_why(error)}") from error
    _check_schema(file, schema)
    return content


def read_json_lines(file: FilePath) -> list[dict[str, Any]]:
    """One JSON object a line.

    Raises:
        ValueError: a missing or damaged file.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {file}: {_why(error)}") from error


def write_tensors(file: FilePath, kind: str, groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Groups of named tensors as one safetensors file, each stored as GROUP/NAME."""
    tensors: dict[str, Tensor] = {}
    written = set()
    for group, named in groups.items():
        for name, tensor in named.items():
            tensor = tensor.detach().contiguous().cpu()
            memory = tensor.untyped_storage().data_ptr()
            tensors[f"{group}/{name}"] = tensor.clone() if memory in written else tensor
            written.add(memory)
    order = {group: list(named) for group, named in groups.items()}
    # One entry, since safetensors writes several in no fixed order: equal content, equal bytes.
    header = {"fastgeo": json.dumps({"schema": SCHEMA, "kind": kind, "order": order})}
    write_bytes(file, safetensors.torch.save(tensors, header))


def read_tensors(
    file: FilePath, kind: str, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """The groups that `write_tensors` was given, names in their order.

    Raises:
        ValueError: a missing or damaged file, one of another kind, or a newer schema.
    """
    try:
        with safetensors.safe_open(file, "pt", device=str(device)) as stored:
            header = json.loads((stored.metadata() or {}).get("fastgeo", "{}"))
            if header.get("kind") != kind:
                raise ValueError(f"it holds no {kind}")
            _check_schema(file, header["schema"])
            return {
                group: {name: stored.get_tensor(f"{group}/{name}") for name in names}
                for group, names in header["order"].items()
            }
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {file}: {_why(error)}") from error


def _check_schema(file: FilePath, schema: int) -> None:
    if schema != SCHEMA:
        raise ValueError(f"{file} has schema {schema}; this fastgeo reads schema {SCHEMA}")


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return getattr(error, "strerror", None) or str(error)
