"""Lock of a rank's store: only one process at a time writes to it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from kimi_mlx.errors import WeightsError


class FolderLock:
    """Lock of a folder, as a context manager. On a disk without locks it does nothing.

    Args:
        folder: existing folder.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._handle = -1

    def __enter__(self) -> FolderLock:
        """Take the lock.

        Raises:
            WeightsError: another process has it.
            OSError: the folder cannot be written.
        """
        self._handle = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._close()
            raise WeightsError(
                f"another process is building `{self._folder}`",
                hint="wait for it or stop it, then run the command again",
            ) from error
        except OSError:  # a disk without locks
            pass
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Release the lock."""
        self._close()

    def _close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1
