"""What fastgeo writes and reads: JSON and safetensors, whole or not at all, never pickle.

Every file is written under a temporary name in the same folder, flushed to the disk and renamed.
JSON and safetensors hold a checksum of their own content, so damage is noticed when they are read;
JSON that tells of other files holds their SHA-256, so they are known to be the ones it tells of.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

SCHEMA = 1
PART = ".part"  # ends the name of what is not complete


@contextlib.contextmanager
def replacing(file: FilePath) -> Iterator[FilePath]:
    """A temporary name in the same folder, which takes the file's place once it is written.

    Raises:
        OSError: the file cannot be written, in a sentence; what was there before is left.
    """
    temporary = file.with_name(f".{file.name}{PART}")
    try:
        with open(temporary, "wb") as stream:
            mode = os.fstat(stream.fileno()).st_mode
        yield temporary
        with open(temporary, "r+b") as stream:
            os.fchmod(stream.fileno(), mode)  # safetensors would have nobody else read it
            os.fsync(stream.fileno())
        os.replace(temporary, file)
        sync_folder(file.parent)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise cannot_write(file, error) from error


def sync_folder(folder: FilePath) -> None:
    """Flush the names in a folder to the disk: a file is lost with its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(file: FilePath, error: Exception) -> OSError:
    """The error as a sentence that names the file."""
    return OSError(f"cannot write {file}: {_why(error)}")


def remove_folder(folder: FilePath) -> None:
    """Remove a folder; under its own name it is complete or absent at any time."""
    if folder.exists():
        dying = folder
        if not folder.name.endswith(PART):
            dying = folder.with_name(f".{folder.name}.old{PART}")
            shutil.rmtree(dying, ignore_errors=True)
            os.replace(folder, dying)
        shutil.rmtree(dying, ignore_errors=True)


def sha256_of(file: FilePath, size: int | None = None) -> str:
    """As `sha256sum` prints it.

    Args:
        size: of the first so many bytes only.

    Raises:
        ValueError: a missing file, or one that cannot be read.
    """
    try:
        with open(file, "rb") as stream:
            if size is not None:
                return hashlib.sha256(stream.read(size)).hexdigest()
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {_why(error)}") from error


def write_bytes(file: FilePath, content: bytes) -> None:
    with replacing(file) as temporary, open(temporary, "wb") as stream:
        stream.write(content)


def write_json(file: FilePath, content: Mapping[str, Any]) -> None:
    """JSON with its schema version in front and its checksum behind."""
    content = {"schema": SCHEMA, **json.loads(json.dumps(content))}
    content["checksum"] = _checksum(content)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_bytes(file, f"{text}\n".encode())


def read_json(file: FilePath) -> dict[str, Any]:
    """The content that `write_json` was given.

    Raises:
        ValueError: a missing, damaged or edited file, or a newer schema.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        _check_schema(content["schema"])
        checksum = content.pop("checksum")
        if checksum != _checksum(content):
            raise ValueError("it was damaged or edited: its checksum is of other content")
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"cannot read {file}: {_why(error)}") from error
    del content["schema"]
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
    header: dict[str, Any] = {"schema": SCHEMA, "kind": kind}
    header["order"] = [[group, list(named)] for group, named in groups.items()]
    header["checksum"] = _checksum(header, tensors)
    with replacing(file) as temporary:
        # One entry, since safetensors writes several in no fixed order: equal content, equal bytes.
        safetensors.torch.save_file(tensors, temporary, {"fastgeo": json.dumps(header)})


def read_tensors(
    file: FilePath, kind: str, device: torch.device | str = "cpu"
) -> dict[str, dict[str, Tensor]]:
    """The groups that `write_tensors` was given, names in their order.

    Raises:
        ValueError: a missing or damaged file, one of another kind, or a newer schema.
    """
    try:
        with safetensors.safe_open(file, "pt") as stored:
            header = json.loads((stored.metadata() or {}).get("fastgeo", "{}"))
            if header.get("kind") != kind:
                raise ValueError(f"it holds no {kind}")
            _check_schema(header["schema"])
            # Copies: the tensors of an open file lie in its memory map, at any alignment.
            tensors = {
                f"{group}/{name}": stored.get_tensor(f"{group}/{name}").clone()
                for group, names in header["order"]
                for name in names
            }
        if header.pop("checksum") != _checksum(header, tensors):
            raise ValueError("it was damaged: its checksum is of other content")
        return {
            group: {name: tensors[f"{group}/{name}"].to(device) for name in names}
            for group, names in header["order"]
        }
    except (
        *(OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError),
        safetensors.SafetensorError,
    ) as error:
        raise ValueError(f"cannot read {file}: {_why(error)}") from error


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of JSON, and of tensors with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    for name, tensor in (tensors or {}).items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_schema(schema: Any) -> None:
    if schema != SCHEMA:
        raise ValueError(
            f"it has schema {schema}, which this fastgeo does not know: it reads schema {SCHEMA}; "
            "a newer fastgeo may"
        )


def _why(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    return getattr(error, "strerror", None) or str(error)
