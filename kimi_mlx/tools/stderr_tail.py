"""The last lines that a server has written to its standard error output."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from typing import TextIO

MAX_BYTES = 4_000
"""Number of bytes kept."""

MAX_LINES = 5
"""Number of lines shown."""

MAX_COLUMNS = 200
"""Number of characters shown of each line."""

PAUSE_S = 0.005
"""Pause between two reads: 13 MB a second at most, so that a flood costs little."""

_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def remove_controls(text: str) -> str:
    """Return a text of a server without control sequences and control characters, except newlines and tabs."""
    return _CONTROL.sub("", text)


class StderrTail:
    """Reads a pipe in a thread of its own and keeps its end.

    Args:
        on_end: function called in that thread when all writers have closed the pipe: the server and its children ended.
    """

    def __init__(self, on_end: Callable[[], None]):
        self._on_end = on_end
        self._tail = b""
        reader, writer = os.pipe()
        self.file: TextIO = os.fdopen(writer, "w")
        """Writing end, for the child. Close it here once the child runs."""
        self._thread = threading.Thread(target=self._read, args=(reader,), daemon=True)
        self._thread.start()

    def lines(self) -> list[str]:
        """Return the last lines without control characters."""
        text = self._tail.decode(errors="replace").replace("\r", "\n")
        lines = [remove_controls(line).rstrip() for line in text.split("\n")]
        return [line[:MAX_COLUMNS] for line in lines if line][-MAX_LINES:]

    def _read(self, reader: int) -> None:
        try:
            while data := os.read(reader, 2**16):
                self._tail = (self._tail + data)[-MAX_BYTES:]
                time.sleep(PAUSE_S)
        finally:
            os.close(reader)
        self._on_end()
