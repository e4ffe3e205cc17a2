"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from kimi_mlx.errors import KimiMlxError

stdout = Console(highlight=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

PROGRESS_AFTER_S = 2.0


def print_json(value: Any) -> None:
    """One JSON document on stdout, in ASCII where that is all that stdout takes."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(value, indent=2, ensure_ascii=not is_utf8), flush=True)


def print_error(error: KimiMlxError) -> None:
    """What failed, and what to do about it."""
    rank = f" (rank {error.rank})" if error.rank is not None and "rank" not in error.message else ""
    stderr.print(Text("error: ", style="bold red") + Text(error.message + rank, style="default"))
    if error.hint:
        stderr.print(Text("hint: ", style="bold") + Text(error.hint))


@contextmanager
def slow_status(is_quiet: bool = False) -> Generator[Callable[[str], None]]:
    """Words on stderr of a terminal for what takes over two seconds; yields what to call with them."""
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
def load_progress(what: str, is_quiet: bool = False) -> Generator[Callable[[int, int], None]]:
    """A bar of layers loaded, on stderr of a terminal; yields what to call with (done, total)."""
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
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
