"""A log of a loop: a line a step, which can be cut back to the step that is gone on from."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from fastgeo.store.files import cannot_write


class StepLog:
    """JSON Lines that grow by a line a step and can be cut back to where they were."""

    def __init__(self, file: FilePath):
        self.file, self._stream = file, None
        self._digest, self._size = hashlib.sha256(), 0

    def start(self) -> None:
        """An empty file."""
        try:
            self._stream = open(self.file, "wb")
        except OSError as error:
            raise cannot_write(self.file, error) from error

    def cut(self, mark: Mapping[str, Any]) -> None:
        """Go on behind the lines that `mark` told of.

        Raises:
            ValueError: they are not there any more.
        """
        size = mark["bytes"]
        try:
            with open(self.file, "rb") as stream:
                lines = stream.read(size)
        except OSError as error:
            raise ValueError(f"cannot read {self.file}: {error.strerror}") from error
        self._digest, self._size = hashlib.sha256(lines), size
        if self._digest.hexdigest() != mark["sha256"]:
            raise ValueError(
                f"{self.file} was damaged: its first {size} bytes are not as they were"
            )
        try:
            self._stream = open(self.file, "r+b")
            self._stream.truncate(size)
            self._stream.seek(size)
        except OSError as error:
            raise cannot_write(self.file, error) from error

    def append(self, line: Mapping[str, Any]) -> None:
        text = f"{json.dumps(line)}\n".encode()
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError as error:
            raise cannot_write(self.file, error) from error
        self._digest.update(text)
        self._size += len(text)

    def mark(self) -> dict[str, Any]:
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}

    def sync(self) -> None:
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        if self._stream is not None:
            try:
                self.sync()
                self._stream.close()
            except OSError:  # the disk is full, which was said when a line did not fit
                pass
            self._stream = None
