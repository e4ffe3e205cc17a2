"""Output of all commands: results on stdout, everything else on stderr."""

from __future__ import annotations

import io
import json
import re
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kimi_mlx.errors import KimiMlxError

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


def print_json(value: Any) -> None:
    """Print one JSON document on stdout; non-ASCII characters are escaped if stdout is not UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_utf8), flush=True)


CONTROL_CHARS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that could control the terminal, or that it cannot show. Names of files may have them."""


def print_note(text: str) -> None:
    """Print a message of the program itself on stderr, dimmed and wrapped."""
    stderr.print(Text(text, style="dim"), soft_wrap=False)


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


@contextmanager
def slow_status(is_quiet: bool = False) -> Generator[Callable[[str], None]]:
    """Show a status on stderr of a terminal, from PROGRESS_AFTER_S on.

    Yields:
        function that sets the text.
    """
    status = stderr.status("")
    timer = threading.Timer(PROGRESS_AFTER_S, status.start)
    timer.daemon = True
    if stderr.is_terminal and not is_quiet:
        timer.start()
    try:
        yield lambda text: status.update(escape(text))
    finally:
        timer.cancel()
        if timer.ident is not None:
            timer.join()
        status.stop()


@contextmanager
def load_progress(labels: str | Sequence[str], is_quiet: bool = False) -> Generator[Callable[..., None]]:
    """Show a progress bar of loaded layers on stderr of a terminal.

    Args:
        labels: label of the bar, or one label per rank for one bar each.
        is_quiet: whether to show nothing.

    Yields:
        function to call with (done, total), or (done, total, rank).
    """
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("layers"),
        TimeElapsedColumn(),
        console=stderr,
        transient=True,
        disable=is_quiet or not stderr.is_terminal,
    )
    with progress:
        tasks = [progress.add_task(label, total=None) for label in ([labels] if isinstance(labels, str) else labels)]

        def update(done: int, total: int, rank: int = 0) -> None:
            progress.update(tasks[rank], completed=done, total=total)

        yield update
