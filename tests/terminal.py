"""Programs on pseudo-terminals of their own, as a user runs them."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from tests.screen import Screen

ROOT = Path(__file__).parents[1]
PATIENCE_S = 30.0
HANG_UP_S = 5.0
"""Limit of the end after the terminal is closed: 2 s on a machine that is not busy."""
# CSI sequences, keypad modes, OSC strings (iTerm2's images), APC strings (kitty's images)
ESCAPES = re.compile(rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[=>]|\x1b\][^\x07]*\x07|\x1b_[^\x1b]*\x1b\\\\")
CTRL_C, CTRL_D, ENTER, ALT_ENTER, CTRL_J, UP, TAB = "\x03", "\x04", "\r", "\x1b\r", "\n", "\x1b[A", "\t"

# The first line makes the pseudo-terminal the one whose Ctrl-C reaches the process.
CONTROLLING_TERMINAL = "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
COMMAND = CONTROLLING_TERMINAL + "from kimi_mlx.cli.app import main; main()"


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, code: str, *arguments: str, columns: int = 100, cwd: Path = ROOT, **environment: str):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.modes = termios.tcgetattr(slave)
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "", **environment},
        )
        self._slave = slave
        self._is_open = True
        self.raw = b""
        self._seen = 0

    @property
    def text(self) -> str:
        """All that was written, without escape sequences."""
        return ESCAPES.sub(b"", self.raw).decode(errors="replace").replace("\r", "")

    @property
    def is_running(self) -> bool:
        """Whether the program has not ended."""
        return self._process.poll() is None

    def send(self, keys: str) -> None:
        data = keys.encode()
        while data:
            data = data[os.write(self._master, data[:1024]) :]
            self.read(0.0)

    def screen(self, columns: int, text: str = "", patience_s: float = PATIENCE_S) -> str:
        """The text on the screen, with its scrollback, as soon as a text is there and nothing more comes."""
        deadline = time.monotonic() + patience_s
        while True:
            num_bytes = len(self.raw)
            self.read(0.2)
            screen = Screen(columns)
            screen.write(self.raw.decode(errors="replace"))
            if text in screen.text and len(self.raw) == num_bytes:
                return screen.text
            assert time.monotonic() < deadline, f"{text!r} did not appear in\n{screen.text}"

    def resize(self, columns: int) -> None:
        """Change the width, as dragging the edge of the window does."""
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def expect(self, text: str, patience_s: float = PATIENCE_S) -> str:
        """Wait until a text appears after the last one that was expected; returns what came up to it."""
        deadline = time.monotonic() + patience_s
        while text not in self.text[self._seen :]:
            assert time.monotonic() < deadline, f"{text!r} did not appear in {self.text[self._seen :]!r}"
            self.read(0.05)
        start, self._seen = self._seen, self.text.index(text, self._seen) + len(text)
        return self.text[start : self._seen]

    def ask(self, keys: str) -> str:
        """Type at the prompt; returns what comes until the next prompt."""
        self.send(keys)
        return self.expect("\n> ")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        deadline = time.monotonic() + PATIENCE_S
        while self._process.poll() is None:
            assert time.monotonic() < deadline, f"still running after {self.text!r}"
            self.read(0.05)
        self.read(0.05)
        return self._process.returncode

    def has_old_modes(self) -> bool:
        """Whether the terminal is as it was before the program."""
        return termios.tcgetattr(self._slave) == self.modes

    def restore_modes(self) -> None:
        """Set the modes that the terminal had before the program, as a shell does when the program is suspended."""
        termios.tcsetattr(self._slave, termios.TCSANOW, self.modes)

    def hang_up(self) -> int:
        """Close the terminal, as its window does; returns the exit code of the program."""
        os.close(self._slave)
        os.close(self._master)
        self._is_open = False
        return self._process.wait(HANG_UP_S)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._is_open:
            os.close(self._master)
            os.close(self._slave)

    def read(self, timeout_s: float) -> None:
        """Receive what the program writes, until it writes nothing."""
        while select.select([self._master], [], [], timeout_s)[0]:
            self.raw += os.read(self._master, 65536)
            timeout_s = 0.0
