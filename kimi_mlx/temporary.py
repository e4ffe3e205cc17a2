"""Temporary folders. One that a power failure or a kill left behind is removed by the next start of kimi-mlx."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PREFIX = "kimi-mlx-"

LOCK_NAME = ".in-use"
"""File that is locked as long as the folder is used. Only folders with this file are ever removed."""


@dataclass(frozen=True)
class TemporaryFolder:
    """A temporary folder in use.

    Args:
        path: path of the folder.
        lock: file descriptor of the lock. A child process that inherits it also keeps the folder.
    """

    path: Path
    lock: int


@contextlib.contextmanager
def temporary_folder(name: str = "") -> Iterator[TemporaryFolder]:
    """Create a folder, and remove it at the end; remove left-over ones first.

    Args:
        name: text that the folder's name contains after PREFIX.

    Raises:
        OSError: the folder for temporary files is full or cannot be written.
    """
    remove_leftover_folders()
    with tempfile.TemporaryDirectory(prefix=f"{PREFIX}{name}", ignore_cleanup_errors=True) as created:
        folder = Path(created)
        lock = os.open(folder / "new", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / LOCK_NAME)  # locked first: another process must not see it unlocked
            yield TemporaryFolder(folder, lock)
        finally:
            os.close(lock)


def remove_leftover_folders() -> None:
    """Remove this user's temporary folders that no process uses. A process id could be in use again after a restart."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{LOCK_NAME}"):
        with contextlib.suppress(OSError):  # removed by another process, or another user's
            lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path.parent, ignore_errors=True)
            finally:
                os.close(lock)
