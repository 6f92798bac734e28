"""One process at a time: the lock of a directory that is being written."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from quantine.errors import OutputError

LOCK_FILE: Final = ".quantine-lock"
"""Name of the file that is locked; it is there only while a process works on the directory."""


class DirectoryLock:
    """Keeps other processes, and other runs of this one, from writing to a directory.

    Whoever decides by what a directory holds takes the lock first: what was seen before may have
    changed by then. The lock ends with the process, however that ends.

    Args:
        directory: is made if it is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: int | None = None

    def take(self) -> None:
        """Take the lock; nothing is done where this object has it already.

        Raises:
            OutputError: another process has it.
            OSError: the directory cannot be written.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        while self._file is None:
            file = os.open(self._path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(file)
                if not isinstance(error, BlockingIOError):
                    raise
                raise OutputError(
                    f"another process is working on {self._directory}: let it finish"
                ) from error
            if self._is_current(file):
                self._file = file
            else:
                os.close(file)

    def release(self) -> None:
        """Let others take the lock; nothing is done where this object does not have it."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with contextlib.suppress(OSError):  # someone may have deleted the whole directory
            self._path.unlink()
        os.close(file)

    @property
    def _path(self) -> Path:
        return self._directory / LOCK_FILE

    def _is_current(self, file: int) -> bool:
        """Whether the locked ``file`` is the one that others find: the last owner removes its."""
        try:
            return os.path.samestat(os.fstat(file), self._path.stat())
        except FileNotFoundError:
            return False
