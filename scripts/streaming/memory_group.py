"""Limit the memory of a process, its page cache included, with a control group (Linux, version 1 or 2, as root)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")

REMOVE_LIMIT_S = 5.0
"""Time after which a group that still has processes is left behind."""


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a limit.

    Args:
        folder: its folder.
        peak_file: name of the file with the highest use.
    """

    folder: Path
    peak_file: str

    @property
    def peak_bytes(self) -> int | None:
        """Highest use, page cache included; None if the system does not count it."""
        try:
            return int((self.folder / self.peak_file).read_text())
        except OSError:
            return None

    def command(self, command: list[str]) -> list[str]:
        """Return a command that joins the group before it starts another one."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup | None]:
    """Create a group with a limit, and remove it at the end; None where the machine does not allow it."""
    group = _create(limit_bytes)
    try:
        yield group
    finally:
        if group is not None:
            _remove(group.folder)


def _create(limit_bytes: int) -> MemoryGroup | None:
    name = f"kimi-mlx-bench-{os.getpid()}"
    for parent, limit_file, peak_file in (
        (ROOT / "memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
        (ROOT, "memory.max", "memory.peak"),
    ):
        folder = parent / name
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / limit_file).exists():
                (folder / limit_file).write_text(str(limit_bytes))
                return MemoryGroup(folder, peak_file)
        except OSError:  # the controller is not delegated
            pass
        _remove(folder)
    return None


def _remove(folder: Path) -> None:
    deadline = time.monotonic() + REMOVE_LIMIT_S
    while folder.is_dir():
        with suppress(OSError):  # the kernel may still count the process that has just ended
            folder.rmdir()
            return
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
