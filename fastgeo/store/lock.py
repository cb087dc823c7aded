"""One process at a time in a run folder."""

import fcntl
import os
from pathlib import Path as FilePath

from fastgeo.store.files import cannot_write

NAME = ".lock"


class Lock:
    """Held from its making until `release`, or until the process ends, however it ends.

    The system's own lock (fcntl), so none is ever left behind by a process that was killed; the
    file itself may be, and means nothing. Unlike with flock, the workers of a DataLoader, which may
    outlive a killed process by seconds, do not hold it; and it holds on network file systems.

    Raises:
        ValueError: another process holds it.
        OSError: the folder cannot be written in.
    """

    def __init__(self, folder: FilePath):
        self.file = folder / NAME
        while True:
            try:
                self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise cannot_write(self.file, error) from error
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(self._descriptor)
                if not isinstance(error, BlockingIOError | PermissionError):
                    raise OSError(f"cannot lock {self.file}: {error.strerror}") from error
                raise ValueError(
                    f"another process is at work in {folder}; wait for it, or name another folder"
                ) from error
            if self._is_still_there():
                return
            os.close(self._descriptor)  # released, and removed, between opening and locking

    def release(self) -> None:
        if self._descriptor is not None:
            if self._is_still_there():
                self.file.unlink()
            os.close(self._descriptor)
            self._descriptor = None

    def _is_still_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.file))
        except FileNotFoundError:
            return False
