"""Reservations of conversations: a conversation is continued by one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

FILE_NAME = "history.lock"


class ConversationLocks:
    """Locks of single bytes in a file, one per conversation. The system releases them when a process ends.

    On a file system without locks every conversation counts as free.

    Args:
        folder: folder of the history.
    """

    def __init__(self, folder: Path):
        self._path = folder / FILE_NAME
        self._descriptor: int | None = None

    def acquire(self, number: int) -> bool:
        """Lock a conversation; return False if another process has locked it."""
        try:
            if self._descriptor is None:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
        return True

    def release(self, number: int) -> None:
        """Unlock a conversation."""
        if self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    def close(self) -> None:
        """Unlock all conversations."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
