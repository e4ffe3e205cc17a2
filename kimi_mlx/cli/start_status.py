"""Say on a terminal that the program is starting, if its imports take long, as after an installation or a restart.

It uses no library, because libraries are what is being imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from types import FrameType

AFTER_S = 2.0
"""Duration of the start after which the line is shown, as PROGRESS_AFTER_S for other work."""

INTERVAL_S = 0.1
STDERR = 2
FALLBACK_COLUMNS = 80
ERASE_LINE = "\r\x1b[2K"


class StartLine:
    """A line on stderr that is shown while the main thread imports, and erased before anything else is written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_shown = self._is_over = False

    def watch(self) -> None:
        """Show the line if the main thread is still importing after a while. Call this in the main thread."""
        if os.isatty(STDERR) and os.environ.get("TERM") != "dumb":
            threading.Thread(target=self._watch, args=(threading.get_ident(),), daemon=True).start()

    def erase(self) -> None:
        """Erase the line if it is shown; it does not come again."""
        if self._is_over:
            return
        with self._lock:
            self._is_over = True
            if self._is_shown:
                _write(ERASE_LINE)

    def _watch(self, main_thread: int) -> None:
        begin = time.monotonic()
        time.sleep(AFTER_S)
        while is_importing(sys._current_frames().get(main_thread)):  # pyright: ignore[reportPrivateUsage]
            with self._lock:
                if self._is_over:
                    return
                self._is_shown = True
                text = f"starting: loading libraries, {time.monotonic() - begin:.0f} s"
                _write(ERASE_LINE + text[: _num_columns() - 1])
            time.sleep(INTERVAL_S)
        self.erase()


START_LINE = StartLine()
"""The line of this process."""


def is_importing(frame: FrameType | None) -> bool:
    """Return whether a frame, or one that called it, belongs to an import."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _num_columns() -> int:
    """Return the width of the terminal: a line that wraps could not be erased."""
    try:
        return os.get_terminal_size(STDERR).columns or FALLBACK_COLUMNS
    except OSError:  # the terminal was closed
        return FALLBACK_COLUMNS


def _write(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal was closed
        os.write(STDERR, text.encode())
