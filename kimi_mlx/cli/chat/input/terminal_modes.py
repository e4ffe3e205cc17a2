"""Modes of the terminal for text that is typed before the input line is open, and between two prompts."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kimi_mlx.cli.chat.signal_handlers import signal_handlers

READING = threading.Lock()
"""Held by what reads the terminal between two prompts, such as a text editor."""

BEGIN_PASTE, END_PASTE = "\x1b[200~", "\x1b[201~"
"""Marks of a terminal around pasted text; they are also sent between prompts."""


def read_typed_ahead() -> list[str]:
    """Return the lines that were typed before the input line is open, for example while the model was loaded.

    The last one is unfinished. The terminal has turned Enter into a line feed, which would mean Ctrl-J at the prompt.
    """
    try:
        return read_typed().split("\n")
    except (OSError, termios.error):  # a closed terminal: the input line reports it
        return [""]


def read_typed() -> str:
    """Return the text that was typed and not read yet, without control characters except line feeds.

    Raises:
        OSError, termios.error: the terminal was closed.
    """
    modes = termios.tcgetattr(sys.stdin)
    unbuffered: list[Any] = [*modes[:6], [*modes[6]]]
    unbuffered[3] &= ~(termios.ICANON | termios.ECHO)  # so that an unfinished line can be read, too
    unbuffered[6][termios.VMIN] = unbuffered[6][termios.VTIME] = 0
    termios.tcsetattr(sys.stdin, termios.TCSANOW, unbuffered)
    typed = b""
    while part := os.read(sys.stdin.fileno(), 4096):
        typed += part
    termios.tcsetattr(sys.stdin, termios.TCSANOW, modes)
    text = typed.decode(errors="replace").replace(BEGIN_PASTE, "").replace(END_PASTE, "").replace("\r", "\n")
    return "".join(character for character in text if character.isprintable() or character == "\n")


@contextmanager
def quiet_between_prompts() -> Generator[None, None, None]:
    """Between prompts, do not echo what is typed but keep it for the next prompt, and ignore Ctrl-C.

    In the canonical mode the system would drop what does not fit into one line of 4096 bytes; here the terminal waits.
    """
    modes = termios.tcgetattr(sys.stdin)
    quiet: list[Any] = [*modes[:6], [*modes[6]]]
    quiet[0] &= ~termios.ICRNL  # keep Enter as the character that prompt_toolkit expects
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    quiet[3] |= termios.NOFLSH  # Ctrl-C stops the answer; it does not drop what was typed
    quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0

    def set_again(number: int, frame: FrameType | None) -> None:
        """Set the modes again after Ctrl-Z and `fg`: shells restore their own."""
        with contextlib.suppress(OSError, termios.error):
            if os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp():  # not in the background, where it would stop us
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)

    with signal_handlers({signal.SIGINT: lambda number, frame: None, signal.SIGCONT: set_again}):
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
        try:
            yield
        finally:
            with contextlib.suppress(termios.error):  # the terminal was closed
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
