"""The input line of the conversation: reads one message of the user, on any terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import closing, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TextIO

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.input.edited_line import EditedInputLine
from kimi_mlx.cli.chat.input.key_bindings import is_continued
from kimi_mlx.cli.chat.input.layout import CONTINUATION, PROMPT
from kimi_mlx.cli.chat.input.terminal_modes import quiet_between_prompts, read_typed_ahead
from kimi_mlx.cli.chat.input.user_input import UserInput


class InputLine(Protocol):
    """Reads what the user types."""

    def read(self, draft: str = "", toolbar: Callable[[int], str] | None = None) -> UserInput:
        """Read one message, which may have several lines; return an empty one if it was cleared.

        Args:
            draft: text to begin with, if this terminal can edit it.
            toolbar: function from a number of columns to a line that is shown below; it is called for each key.

        Raises:
            EOFError: Ctrl-D was pressed, or the input has ended.
            KeyboardInterrupt: Ctrl-C was pressed on an empty line.
        """
        ...


@contextmanager
def open_input_line(commands: Iterable[Command], history: Path | None) -> Generator[InputLine, None, None]:
    """Open the best input line that this terminal supports.

    Args:
        commands: commands to complete, with their arguments.
        history: file of previous messages; None keeps them in memory only.
    """
    stream = next((stream for stream in (sys.stdout, sys.stderr) if stream.isatty()), None)
    if stream is None or os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        yield PlainInputLine(sys.stdin.buffer, sys.stderr)
        return
    typed_ahead = read_typed_ahead()
    with quiet_between_prompts(), closing(EditedInputLine(commands, history, stream, typed_ahead)) as line:
        yield line


class PlainInputLine:
    """An input line for a terminal without any control sequences; a backslash at the end continues the line."""

    def __init__(self, source: BinaryIO, prompts: TextIO):
        self._source = source
        self._prompts = prompts

    def read(self, draft: str = "", toolbar: Callable[[int], str] | None = None) -> UserInput:
        """Read one message; the draft and the line at the bottom cannot be shown here."""
        lines = [self._read_line(PROMPT)]
        while is_continued(lines[-1]):
            lines[-1] = lines[-1][:-1]
            lines.append(self._read_line(CONTINUATION))
        return UserInput("\n".join(lines))

    def _read_line(self, prompt: str) -> str:
        try:
            print(prompt, end="", file=self._prompts, flush=True)
            line = self._source.readline()
            if not line:
                raise EOFError
        except OSError:  # the terminal was closed
            raise EOFError from None
        except (KeyboardInterrupt, EOFError):
            print(file=self._prompts)
            raise
        return line.decode("utf-8", errors="replace").removesuffix("\n")
