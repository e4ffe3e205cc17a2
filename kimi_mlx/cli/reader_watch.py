"""Watch the reader of standard output, to end work that nobody reads, as in `kimi-mlx chat -p hi | head -1`.

A write to a pipe without a reader fails, but a model that loads or reasons writes nothing for minutes.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

from kimi_mlx.cli.signals import end_command

POLL_MS = 300


@contextmanager
def end_without_reader() -> Generator[None]:
    """End the command as SIGPIPE does once the reader of standard output has gone. Files and terminals have none."""
    is_over = threading.Event()
    if _has_reader():
        threading.Thread(target=_watch, args=(sys.stdout.fileno(), is_over), daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _has_reader() -> bool:
    """Return whether standard output is a pipe or a socket."""
    try:
        mode = os.fstat(sys.stdout.fileno()).st_mode
    except (OSError, ValueError):  # no real file, as in a test
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _watch(descriptor: int, is_over: threading.Event) -> None:
    poll = select.poll()
    poll.register(descriptor, 0)  # POLLERR and POLLHUP are always reported
    while not is_over.is_set():
        if poll.poll(POLL_MS) and not is_over.is_set():
            end_command(signal.SIGPIPE)
            return
