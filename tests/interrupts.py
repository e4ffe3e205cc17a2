"""Press Ctrl-C in a program on a terminal, and check what it leaves: processes, modes of the terminal, its cursor."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path
from typing import Any

from tests.terminal import CONTROLLING_TERMINAL, CTRL_C, Terminal

MAIN = CONTROLLING_TERMINAL + "from kimi_mlx.__main__ import main; print('BEGIN', flush=True); main()"
"""The program as its script starts it, after Python itself has started."""

END_S = 30.0
"""Limit for the end after Ctrl-C, on a busy machine."""

HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
PASTE_ON, PASTE_OFF = b"\x1b[?2004h", b"\x1b[?2004l"


class Interrupted:
    """A program on a terminal whose processes, and those that they start, can be found by their environment.

    Args:
        arguments: arguments of the program.
        code: the program.
        settings: settings of the terminal, and environment variables.
    """

    def __init__(self, *arguments: str, code: str = MAIN, **settings: Any):
        self._mark = f"mark-{uuid.uuid4().hex}"
        self.terminal = Terminal(code, *arguments, TEST_MARK=self._mark, **settings)
        self.terminal.expect("BEGIN\n")

    def run_for(self, seconds: float) -> None:
        """Let the program run for a while, or to its end."""
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            self.terminal.read(min(rest, 0.02))

    def press(self, number: int | None = None) -> None:
        """Press Ctrl-C, or send a signal."""
        if number is None:
            self.terminal.send(CTRL_C)
        elif self.terminal.is_running:
            self.terminal.signal(number)

    def end(self, presses_again_after_s: float = 3.0) -> int:
        """Wait for the end; return the exit code. A conversation that waits for input needs Ctrl-C again, twice."""
        deadline, again_at = time.monotonic() + END_S, time.monotonic() + presses_again_after_s
        while self.terminal.is_running:
            assert time.monotonic() < deadline, f"it runs {END_S} s after Ctrl-C: {self.terminal.text[-1000:]!r}"
            if time.monotonic() > again_at:
                self.terminal.send(CTRL_C)
                again_at += 1.0
            self.terminal.read(0.05)
        return self.terminal.wait()

    def check_nothing_is_left(self) -> None:
        """Check that no process is left, and that the terminal is as before."""
        deadline = time.monotonic() + END_S
        while left := self.processes():
            assert time.monotonic() < deadline, f"left: {left} after {self.terminal.text[-1000:]!r}"
            time.sleep(0.05)
        raw, text = self.terminal.raw, self.terminal.text
        assert self.terminal.has_old_modes(), text[-1000:]
        assert "Traceback" not in text, text[-2000:]
        assert raw.rfind(HIDE_CURSOR) <= raw.rfind(SHOW_CURSOR), text[-1000:]
        assert raw.rfind(PASTE_ON) <= raw.rfind(PASTE_OFF), text[-1000:]

    def processes(self) -> dict[int, str]:
        """Command lines of the processes that run, by process id."""
        found: dict[int, str] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self._mark.encode() in (folder / "environ").read_bytes():
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (OSError, ValueError):  # it has ended
                continue
        return found

    def close(self) -> None:
        """End what is left."""
        self.terminal.close()
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
