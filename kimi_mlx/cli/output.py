"""Output of all commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TextIO, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from kimi_mlx.errors import KimiMlxError
from kimi_mlx.units import format_seconds


class Closable(Protocol):
    """A session or a ring."""

    def close(self) -> None:
        """End all processes and release all memory."""
        ...


C = TypeVar("C", bound=Closable)

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class _NullFile(io.TextIOBase):
    """A file that forgets what is written."""

    def write(self, text: str, /) -> int:
        """Forget a text."""
        return len(text)


silent = Console(file=cast("TextIO", _NullFile()), quiet=True)
"""A console that shows nothing, for `--quiet`."""

PROGRESS_AFTER_S = 2.0
"""Duration after which progress is shown."""

NARROW, WIDE, MIN_LABEL = 64, 110, 10
"""Numbers of columns: progress has no bar below the first and a long one from the second on; labels have the third."""


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; non-ASCII characters are escaped if stdout is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_utf8), flush=True)


CONTROL_CHARS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that could control the terminal or the order of others, or that it cannot show. Files may have them."""


def print_note(text: str) -> None:
    """Print a message of the program itself on stderr, dimmed, and on a terminal wrapped."""
    stderr.print(Text(text, style="dim"), soft_wrap=not stderr.is_terminal)


def print_warning(text: str) -> None:
    """Print a warning on stderr, with control characters escaped."""
    stderr.print(Text(f"warning: {escape_controls(text)}", style="yellow"))


def print_error(error: KimiMlxError) -> None:
    """Print an error and its hint, with control characters escaped."""
    stderr.print(Text("error: ", style="bold red") + Text(escape_controls(_error_text(error)), style="default"))
    if error.hint:
        stderr.print(Text("hint: ", style="bold") + Text(escape_controls(error.hint)))


def escape_controls(text: str) -> str:
    """Return a text with its control characters written as escapes, such as `\\x1b`."""
    return CONTROL_CHARS.sub(lambda match: ascii(match[0])[1:-1], text)


def error_to_dict(error: KimiMlxError) -> dict[str, str | None]:
    """Return an error for JSON."""
    return {"error": _error_text(error), "hint": error.hint}


def _error_text(error: KimiMlxError) -> str:
    """Return the message, with the rank if it does not name it."""
    return error.message + (f" (rank {error.rank})" if error.rank is not None and "rank" not in error.message else "")


def hides_messages(is_json: bool) -> bool:
    """Return whether progress and notices are left out: those of `--json` are for a person at a terminal only."""
    return is_json and not stderr.is_terminal


@contextmanager
def slow_status(is_quiet: bool = False) -> Generator[Callable[[str], None]]:
    """Show a status and its age on stderr of a terminal, from PROGRESS_AFTER_S on.

    Yields:
        function that sets the text.
    """
    progress = Progress(
        SpinnerColumn(),
        LabelColumn(reserved=12),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=is_quiet or not stderr.is_terminal,
    )
    task = progress.add_task("")

    def start() -> None:
        # inherited by the thread that redraws: Ctrl-C is to interrupt the main thread, also where it waits
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        progress.start()

    timer = threading.Timer(PROGRESS_AFTER_S, start)
    timer.daemon = True
    try:
        if not progress.disable:
            timer.start()  # waits for its thread, so Ctrl-C may come here
        yield lambda text: progress.update(task, description=text)
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        progress.stop()


@contextmanager
def closing_with_status(closable: C, is_quiet: bool = False) -> Generator[C]:
    """Close a session or a ring at the end; its ranks may take long to end and to release their memory."""
    try:
        yield closable
    finally:
        with slow_status(is_quiet) as set_status:
            set_status("ending and releasing memory")
            closable.close()


@contextmanager
def load_progress(labels: str | Sequence[str], is_quiet: bool = False) -> Generator[Callable[..., None]]:
    """Show a progress bar of loaded layers on stderr of a terminal.

    Args:
        labels: label of the bar, or one label per rank for one bar each.
        is_quiet: whether to show nothing.

    Yields:
        function to call with (done, total), or (done, total, rank).
    """
    is_narrow = stderr.width < NARROW
    progress = Progress(
        SpinnerColumn(),
        LabelColumn(reserved=28 if is_narrow else 48 if stderr.width < WIDE else 80),
        *bar_columns(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        *([] if is_narrow else [TextColumn("{task.fields[remaining]}")]),
        console=stderr,
        transient=True,
        disable=is_quiet or not stderr.is_terminal,
    )
    with progress:
        tasks = [
            progress.add_task(label, total=None, amount="starting", remaining="")
            for label in ([labels] if isinstance(labels, str) else labels)
        ]

        def update(done: int, total: int, rank: int = 0) -> None:
            remaining_s = progress.tasks[rank].time_remaining
            progress.update(
                tasks[rank],
                completed=done,
                total=total,
                amount=f"{done}/{total} layers" if done < total else "preparing",
                remaining=f"{format_seconds(remaining_s)} left" if remaining_s and done < total else "",
            )

        yield update


class LabelColumn(ProgressColumn):
    """The description of a task in one line: it is cut so that the other columns fit beside it.

    Args:
        reserved: number of columns of the terminal for the other columns.
    """

    def __init__(self, reserved: int):
        super().__init__()
        self._reserved = reserved

    def render(self, task: Task) -> Text:
        """Return the description, cut to the width that is left."""
        text = Text(task.description, no_wrap=True)
        text.truncate(max(stderr.width - self._reserved, MIN_LABEL), overflow="ellipsis")
        return text


def bar_columns() -> list[ProgressColumn]:
    """Return the bar of a progress line, shorter on a narrow terminal; none if it is too narrow."""
    return [] if stderr.width < NARROW else [BarColumn(bar_width=10 if stderr.width < WIDE else 40)]
