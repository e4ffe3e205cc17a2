"""How far a download has come: bars on a terminal, a line now and then into a pipe or a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

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
from kimi_mlx.hub.licence import show_once
from kimi_mlx.store.locate import ModelRef
from kimi_mlx.store.rounds import BuildProgress
from kimi_mlx.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kimi_mlx.store.build import BuildProgress  # imports MLX; a usage error needs neither

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


class TerminalObserver:
    """Bars, or lines into a pipe.

    Args:
        target: the model.
        is_quiet: says nothing at all.
    """

    def __init__(self, target: ModelRef, is_quiet: bool):
        self._target, self._is_quiet = target, is_quiet

    def beginning(self, vision_bytes: int) -> None:
        """The licence, once, and what is left out."""
        print_licence_once(self._target, self._is_quiet)
        if not self._is_quiet and vision_bytes:
            stderr.print(f"the vision part ({format_bytes(vision_bytes)}) is left out: text only")

    def checking(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """One bar."""
        return byte_progress("checking", total_bytes, self._is_quiet)

    @contextmanager
    def building(self) -> Generator[Callable[[BuildProgress], None]]:
        """A bar for what is fetched, and one for what is stored."""
        with byte_bars(self._is_quiet) as bars:
            fetching = bars.add_task(f"fetching {self._target.name}", total=None)
            storing = bars.add_task("storing", total=None)

            def report(progress: BuildProgress) -> None:
                bars.update(fetching, completed=progress.fetched_bytes, total=progress.total_bytes)
                bars.update(storing, completed=progress.stored_bytes, total=progress.total_bytes)

            yield report


def print_licence_once(target: ModelRef, is_quiet: bool) -> None:
    """What the licence of the weights asks of large products, at the first download."""
    if target.entry is not None and not is_quiet:
        show_once(target.entry, lambda text: stderr.print(text, style="dim", markup=False))
