"""One process at a time in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path as FilePath

from fastgeo.store.files import cannot_write

NAME = ".lock"


@contextlib.contextmanager
def locked(folder: FilePath) -> Iterator[None]:
    """No other process is in here for a while, or until this one ends, however it ends.

    The system's own lock (fcntl), so none is ever left behind by a process that was killed; the
    file itself may be, and means nothing. Unlike with flock, the workers of a DataLoader, which may
    outlive a killed process by seconds, do not hold it; and it holds on network file systems.

    Raises:
        ValueError: another process is.
        OSError: the folder cannot be written in.
    """
    file = folder / NAME
    descriptor = _locked(file)
    while not _is_there(descriptor, file):  # released, and removed, between opening and locking
        os.close(descriptor)
        descriptor = _locked(file)
    try:
        yield
    finally:
        if _is_there(descriptor, file):
            file.unlink()
        os.close(descriptor)


def _locked(file: FilePath) -> int:
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(file, error) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, BlockingIOError | PermissionError):
            raise OSError(f"cannot lock {file}: {error.strerror}") from error
        raise ValueError(
            f"another process is at work in {file.parent}; wait for it, or name another folder"
        ) from error
    return descriptor


def _is_there(descriptor: int, file: FilePath) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
