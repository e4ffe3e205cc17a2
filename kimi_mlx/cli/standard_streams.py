"""Standard streams that may be closed from the start, or whose reader or terminal goes away."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

from kimi_mlx.cli.start_status import START_LINE

GONE = {errno.EPIPE: signal.SIGPIPE, errno.ECONNRESET: signal.SIGPIPE, errno.EIO: signal.SIGHUP}
"""Error of a stream without a reader -> signal that ends other programs in this case. EIO: a closed terminal."""

OUTPUT = "standard output"
"""File name of errors of stdout and stderr."""


class _Output(io.FileIO):
    """A file descriptor that becomes /dev/null when its reader goes away.

    Args:
        descriptor: 1 or 2; it stays open.
        on_gone: callback for the loss of the reader; gets the exit code, 128 plus the signal in GONE.
    """

    def __init__(self, descriptor: int, on_gone: Callable[[int], None]):
        super().__init__(descriptor, "w", closefd=False)
        self._on_gone = on_gone

    def write(self, data: Any, /) -> int:
        """Write bytes. Without a reader they are dropped, and count as written."""
        START_LINE.erase()
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                error.filename = OUTPUT  # else a full disk of stdout looks like any other
                raise
            _open_null(self.fileno())
            self._on_gone(128 + GONE[error.errno])
            return len(data)


def repair_standard_streams() -> None:
    """Open closed streams as /dev/null, and make streams that lose their reader raise no errors.

    Otherwise the next file or socket would get the number of a closed stream, and receive its text. A lost stdout ends
    the program quietly, with the exit code of SIGPIPE or SIGHUP; a lost stderr does not matter.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _open_null(descriptor)
    sys.stdout = _text_stream(sys.stdout, _Output(1, sys.exit))
    sys.stderr = _text_stream(sys.stderr, _Output(2, lambda code: None))


def _open_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _text_stream(previous: TextIO | None, output: _Output) -> TextIO:
    """Return a text stream with the encoding of the previous one (None if closed); characters outside it become `?`."""
    encoding = "utf-8" if previous is None else previous.encoding
    is_terminal = output.isatty()
    return io.TextIOWrapper(io.BufferedWriter(output), encoding, errors="replace", line_buffering=is_terminal)
