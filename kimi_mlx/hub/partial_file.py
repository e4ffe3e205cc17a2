"""The file in which a download is while it is not complete, and who has it in hand."""

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
"""Called with the number of bytes that have come; negative when some are thrown away."""

MAX_LOCK_WAIT_S = 600.0
"""For another process that has the same file in hand, while its file does not grow."""


def ignore_progress(count: int) -> None:
    """Nobody wants to know."""


class ProgressMeter:
    """Tells progress from positions.

    Args:
        progress: told the differences.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self.position = 0

    def move_to(self, position: int) -> None:
        """So many bytes are there now."""
        if position != self.position:
            self._progress(position - self.position)
            self.position = position

    def advance(self, count: int) -> None:
        """So many more."""
        self.move_to(self.position + count)


def part_path(target: Path) -> Path:
    """Where a file is while it is not complete."""
    return target.with_name(f"{target.name}.part")


def xet_part_path(target: Path) -> Path:
    """Where hf-xet writes it, which cannot go on where it left off."""
    return target.with_name(f"{target.name}.xet-part")


@contextmanager
def lock_partial_file(target: Path, meter: ProgressMeter, stop: threading.Event) -> Iterator[FileIO]:
    """Open the part, to read and to append, when no other thread or process has it; the lock ends with the process."""
    part, size, since_s = part_path(target), 0, time.monotonic()
    while True:
        with part.open("a+b", buffering=0) as stream:
            if _lock(stream):
                if _is_open_as(stream, part):
                    yield stream
                    return
                continue  # the other process renamed it while we waited
            grown = max(os.fstat(stream.fileno()).st_size, _size(xet_part_path(target)))
        if grown != size:
            size, since_s = grown, time.monotonic()
            meter.move_to(size)
        if time.monotonic() - since_s > MAX_LOCK_WAIT_S:
            raise WeightsError(
                f"another process has `{part}` in hand and has not written to it for {MAX_LOCK_WAIT_S:.0f} s",
                hint=f"end that process: `lsof {part}` shows it",
            )
        if stop.wait(0.2):
            raise Cancelled


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _is_open_as(stream: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(stream: FileIO) -> bool:
    try:
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: two processes at once break the file, and its checksum tells
        return True
    return True
