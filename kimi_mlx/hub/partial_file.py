"""File of an incomplete download, and its lock."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.hub.retries import Cancelled

Progress = Callable[[int], None]
"""Callback for the number of new bytes; negative if bytes are discarded."""

MAX_LOCK_WAIT_S = 600.0
"""Longest wait for a process that has locked the file, while the file does not grow."""


def ignore_progress(count: int) -> None:
    """Do nothing."""


class ProgressMeter:
    """Convert positions in a file to numbers of new bytes.

    Args:
        progress: callback for the number of new bytes.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self.position = 0

    def move_to(self, position: int) -> None:
        """Set the number of bytes on disk."""
        if position != self.position:
            self._progress(position - self.position)
            self.position = position

    def advance(self, count: int) -> None:
        """Add to the number of bytes on disk."""
        self.move_to(self.position + count)


def part_path(target: Path) -> Path:
    """Return the path of a file while it is incomplete."""
    return target.with_name(f"{target.name}.part")


def xet_part_path(target: Path) -> Path:
    """Return the path that hf-xet writes to. Such a file cannot be resumed."""
    return target.with_name(f"{target.name}.xet-part")


@contextmanager
def lock_partial_file(target: Path, meter: ProgressMeter, stop: threading.Event) -> Iterator[FileIO]:
    """Lock and open the partial file for reading and appending, once no other thread or process holds the lock.

    The lock ends with the process.
    """
    part, size, since_s = part_path(target), 0, time.monotonic()
    while True:
        with part.open("a+b", buffering=0) as stream:
            if _lock(stream):
                if _is_same_file(stream, part):
                    yield stream
                    return
                continue  # another process renamed it in the meantime
            new_size = max(os.fstat(stream.fileno()).st_size, _size(xet_part_path(target)))
        if new_size != size:
            size, since_s = new_size, time.monotonic()
            meter.move_to(size)
        if time.monotonic() - since_s > MAX_LOCK_WAIT_S:
            raise WeightsError(
                f"`{part}` is locked by another process that has been idle for {MAX_LOCK_WAIT_S:.0f} s",
                hint=f"stop that process: `lsof {part}` shows its id",
            )
        if stop.wait(0.2):
            raise Cancelled


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_same_file(stream: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(stream: FileIO) -> bool:
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks on this file system: concurrent writers corrupt the file, which its checksum detects
        return True
    return True
