"""The log file of a service: its size limit, and its last lines."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from kimi_mlx.folders import state_folder
from kimi_mlx.services.service import LOG_VARIABLE

MAX_BYTES = 10_000_000
"""Size from which the log is moved to the older one, which is overwritten."""

POLL_S = 0.25


def log_path(name: str) -> Path | None:
    """Return the log file of a service; None for a user without a home folder."""
    folder = state_folder()
    return None if folder is None else folder / "logs" / f"service-{name}.log"


def older_log(path: Path) -> Path:
    """Return the file with the older part of a log."""
    return path.with_name(f"{path.name}.1")


def limit_log_size(max_bytes: int = MAX_BYTES) -> None:
    """Move the content of this process's log to the older file if it is too large.

    launchd and systemd have opened the file to append, so it can be emptied while it is being written. Do nothing in a
    process that is not a service.
    """
    name = os.environ.get(LOG_VARIABLE)
    if not name:
        return
    path = Path(name)
    try:
        if path.stat().st_size > max_bytes:
            shutil.copyfile(path, older_log(path))
            os.truncate(path, 0)
    except OSError:
        return  # a full disk: the server continues


def last_lines(path: Path, count: int) -> list[str]:
    """Return the last lines of a log, from the older file too if needed."""
    return _last_lines(path, count, _size(path))


def follow(path: Path, count: int) -> Iterator[str]:
    """Yield the last lines of a log, then each new line as it is written, without end."""
    position = _size(path)
    yield from _last_lines(path, count, position)
    rest = b""
    while True:
        size = _size(path)
        if size < position:  # emptied
            position, rest = 0, b""
        if size > position:
            data = _read(path, position, size)
            position += len(data)
            *lines, rest = (rest + data).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        else:
            time.sleep(POLL_S)


def _last_lines(path: Path, count: int, size: int) -> list[str]:
    """Return the last lines of the first `size` bytes of a log."""
    lines = _read(path, 0, size).decode(errors="replace").splitlines()
    if len(lines) < count:
        older = older_log(path)
        lines = _read(older, 0, _size(older)).decode(errors="replace").splitlines() + lines
    return lines[max(len(lines) - count, 0) :]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _read(path: Path, start: int, end: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)
    except FileNotFoundError:
        return b""
