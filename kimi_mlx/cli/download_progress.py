"""Progress of a download: bars on a terminal, a line from time to time in a pipe or log."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    DownloadColumn,
    Progress,
    Task,
    TaskID,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kimi_mlx.cli.output import NARROW, PROGRESS_AFTER_S, WIDE, LabelColumn, bar_columns, slow_status, stderr
from kimi_mlx.hub.licence import show_once
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from kimi_mlx.store.rounds import BuildProgress  # imports MLX

LINE_EVERY_S = 15.0


class ProgressLines(Progress):
    """Progress in lines instead of bars: a task that takes long prints one every LINE_EVERY_S, and one at its end."""

    def __init__(self) -> None:
        super().__init__(disable=True)
        self._due_s: dict[TaskID, float] = {}
        self._with_lines: set[TaskID] = set()  # unfinished tasks that have printed a line

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Update a task and print its line if one is due."""
        super().update(task_id, **changes)
        self._print_line(self._tasks[task_id])

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Advance a task and print its line if one is due."""
        super().advance(task_id, advance)
        self._print_line(self._tasks[task_id])

    def _print_line(self, task: Task) -> None:
        now = time.monotonic()
        if not task.total:
            return
        due_s = self._due_s.setdefault(task.id, now + PROGRESS_AFTER_S)
        has_line = task.id in self._with_lines
        if not (has_line if task.finished else now >= due_s):
            return
        (self._with_lines.discard if task.finished else self._with_lines.add)(task.id)
        self._due_s[task.id] = now + LINE_EVERY_S
        parts = [f"{task.description}: {format_bytes(task.completed)} of {format_bytes(task.total)}"]
        if task.speed:
            parts.append(f"{format_bytes(task.speed)}/s")
        if task.time_remaining:
            parts.append(f"{format_seconds(task.time_remaining)} left")
        stderr.print(", ".join(parts), markup=False)


def byte_bars(is_quiet: bool) -> Progress:
    """Return progress bars of bytes, with speed and remaining time; use them as a context manager."""
    if not is_quiet and not stderr.is_terminal:
        return ProgressLines()
    return Progress(
        LabelColumn(reserved=30 if stderr.width < NARROW else 54 if stderr.width < WIDE else 82),
        *bar_columns(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=is_quiet,
    )


@contextmanager
def byte_progress(label: str, total_bytes: int, is_quiet: bool) -> Generator[Callable[[int], None]]:
    """Show one progress bar.

    Yields:
        function to call with the number of further bytes.
    """
    with byte_bars(is_quiet) as progress:
        task = progress.add_task(label, total=total_bytes)
        yield lambda count: progress.advance(task, count)


def fetch_label(target: ModelRef) -> str:
    """Return the label of the progress of a model's files, which are read from a folder or downloaded."""
    return f"{'downloading' if target.folder is None else 'reading'} {target.name}"


class TerminalObserver:
    """Observer of a download that shows progress bars, or lines in a pipe.

    Args:
        target: the model.
        is_quiet: whether to print nothing at all.
    """

    def __init__(self, target: ModelRef, is_quiet: bool):
        self._target, self._is_quiet = target, is_quiet

    @contextmanager
    def on_look_up(self) -> Generator[None]:
        """Show a status while the files are looked up."""
        with slow_status(self._is_quiet) as set_status:
            set_status(f"reading the list and the headers of the files of {self._target.name}")
            yield

    def on_start(self, skipped_bytes: int) -> None:
        """Print the licence, once per model, and that the vision tower is left out if it is."""
        print_licence_once(self._target, self._is_quiet)
        if not self._is_quiet and skipped_bytes:
            stderr.print(f"the vision tower ({format_bytes(skipped_bytes)}) is left out: images will be refused")

    def on_check(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show a progress bar of checked bytes."""
        return byte_progress("checking", total_bytes, self._is_quiet)

    def on_rewrite(self, total_bytes: int) -> AbstractContextManager[Callable[[int], None]]:
        """Say what is rewritten, and show a progress bar."""
        print_rewrite(total_bytes, self._is_quiet)
        return byte_progress("rewriting", total_bytes, self._is_quiet)

    @contextmanager
    def on_build(self) -> Generator[Callable[[BuildProgress], None]]:
        """Show a progress bar of downloaded bytes and one of stored bytes."""
        with byte_bars(self._is_quiet) as bars:
            fetching = bars.add_task(fetch_label(self._target), total=None)
            storing = bars.add_task("storing", total=None)

            def report(progress: BuildProgress) -> None:
                bars.update(fetching, completed=progress.fetched_bytes, total=progress.total_bytes)
                bars.update(storing, completed=progress.stored_bytes, total=progress.total_bytes)

            yield report


def print_rewrite(total_bytes: int, is_quiet: bool) -> None:
    """Print why files of an earlier version are rewritten."""
    if not is_quiet:
        stderr.print(
            f"rewriting {format_bytes(total_bytes)} file by file: each expert becomes one record, which can be read "
            "from the SSD at once",
            style="dim",
        )


def print_licence_once(target: ModelRef, is_quiet: bool) -> None:
    """Print what the licence requires of large products, at the first download of a model."""
    if target.entry is not None and not is_quiet:
        show_once(target.entry, lambda text: stderr.print(text, style="dim", markup=False))
