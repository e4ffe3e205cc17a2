"""How far a download has come: bars on a terminal, a line now and then into a pipe or a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kimi_mlx.cli.output import stderr
from kimi_mlx.units import format_bytes, format_seconds

LINE_EVERY_S = 15.0


class Lines(Progress):
    """Bars that are never drawn: each task says a line when it begins, and again after LINE_EVERY_S."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._said_s: dict[TaskID, float] = {}

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """As Progress.update."""
        super().update(task_id, **changes)
        self._tell(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """As Progress.advance."""
        super().advance(task_id, advance)
        self._tell(self._tasks[task_id])

    def _tell(self, task: Task) -> None:
        now = time.monotonic()
        if not task.total or task.finished or now - self._said_s.get(task.id, -LINE_EVERY_S) < LINE_EVERY_S:
            return
        self._said_s[task.id] = now
        parts = [f"{task.description}: {format_bytes(task.completed)} of {format_bytes(task.total)}"]
        if task.speed:
            parts.append(f"{format_bytes(task.speed)}/s")
        if task.time_remaining:
            parts.append(f"{format_seconds(task.time_remaining)} left")
        stderr.print(", ".join(parts), markup=False)


def byte_bars(is_quiet: bool) -> Progress:
    """Bars of bytes with speed and time left; a context manager."""
    if not is_quiet and not stderr.is_terminal:
        return Lines()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=is_quiet,
    )


@contextmanager
def byte_progress(what: str, total_bytes: int, is_quiet: bool) -> Generator[Callable[[int], None]]:
    """One bar; yields what to call with more bytes."""
    with byte_bars(is_quiet) as progress:
        task = progress.add_task(what, total=total_bytes)
        yield lambda count: progress.advance(task, count)
