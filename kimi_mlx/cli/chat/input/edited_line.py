"""The line editor on a terminal that can move the cursor."""

from __future__ import annotations

import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.completion import ThreadedCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.output import ColorDepth, Output
from prompt_toolkit.output.vt100 import Vt100_Output

from kimi_mlx.cli.chat.commands.commands import Command
from kimi_mlx.cli.chat.input.completion import MessageCompleter
from kimi_mlx.cli.chat.input.history_file import open_history
from kimi_mlx.cli.chat.input.key_bindings import BUFFER_NAME, create_key_bindings, editing_mode
from kimi_mlx.cli.chat.input.layout import STYLE, create_layout
from kimi_mlx.cli.chat.input.line_application import LineApplication
from kimi_mlx.cli.chat.input.pasted_blocks import PastedBlocks
from kimi_mlx.cli.chat.input.terminal_input import TerminalInput, add_csi_u_keys
from kimi_mlx.cli.chat.input.text_editor import edit_text
from kimi_mlx.cli.chat.input.typed_ahead import TypedAhead
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.output import print_error
from kimi_mlx.errors import UsageError


class EditedInputLine:
    """An input line with editing, completion, history and pasted blocks.

    Args:
        commands: commands to complete.
        history: file of previous messages; None keeps them in memory only.
        stream: terminal to write to.
        typed_ahead: lines that were typed before: read() returns all but the last one, which is unfinished.
    """

    def __init__(self, commands: Iterable[Command], history: Path | None, stream: TextIO, typed_ahead: Sequence[str]):
        add_csi_u_keys()
        self._blocks = PastedBlocks()
        self._toolbar: Callable[[int], str] = _no_toolbar
        self._buffer = Buffer(
            name=BUFFER_NAME,
            multiline=True,
            completer=ThreadedCompleter(MessageCompleter(commands)),
            history=open_history(history, self._blocks),
            accept_handler=self._accept,
        )
        self._input = TerminalInput(sys.stdin)
        self._input.store_typed_ahead("\r".join(typed_ahead).encode())
        self._between = TypedAhead(sys.stdin.fileno())
        self._output = _open_output(stream)
        self._app = LineApplication(
            layout=create_layout(self._buffer, self._blocks, lambda width: self._toolbar(width)),
            key_bindings=create_key_bindings(self._blocks, self._edit),
            editing_mode=editing_mode(),
            reverse_vi_search_direction=True,
            style=STYLE,
            include_default_pygments_style=False,
            input=self._input,
            output=self._output,
        )

    def read(self, draft: str = "", toolbar: Callable[[int], str] | None = None) -> UserInput:
        """Read one message."""
        text = self._blocks.collapse_draft(draft)
        self._toolbar = toolbar or _no_toolbar
        self._app.erase_when_done = False
        try:
            self._input.store_typed_ahead(self._between.stop())
            edited = self._app.run(pre_run=lambda: self._buffer.reset(Document(text)))
        except (OSError, termios.error):  # the terminal was closed
            raise EOFError from None
        finally:
            self._keep_pastes_whole()
            self._between.start()
        return _without_surrogates(self._blocks.expand(edited))

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._between.close()
        with contextlib.suppress(OSError):
            self._output.disable_bracketed_paste()
            self._output.flush()

    def _accept(self, buffer: Buffer) -> bool:
        self._app.exit(result=buffer.text)
        return True  # keep the text: it is shown once more

    def _keep_pastes_whole(self) -> None:
        """Let the terminal mark pasted text during an answer: else each of its lines would be sent as a message."""
        with contextlib.suppress(OSError):
            self._output.enable_bracketed_paste()
            self._output.flush()

    def _edit(self, buffer: Buffer) -> None:
        """Replace the edited text by what the user's text editor returns; an error leaves it as it is."""
        try:
            text = edit_text(self._blocks.expand(buffer.text).text)
        except UsageError as error:
            print_error(error)
        else:
            buffer.document = Document(self._blocks.collapse_draft(text))


def _no_toolbar(width: int) -> str:
    return ""


def _open_output(stream: TextIO) -> Output:
    colours = ColorDepth.from_env()  # none with NO_COLOR
    output = Vt100_Output.from_pty(stream, term=os.environ.get("TERM"), default_color_depth=colours)
    # Do not query the cursor position: it warns about terminals that do not answer, and a late answer would become
    # part of the next message.
    output.enable_cpr = False
    return output


def _without_surrogates(message: UserInput) -> UserInput:
    """Replace bytes that were not UTF-8 by question marks."""
    return UserInput(message.text.encode("utf-8", errors="replace").decode("utf-8"), message.pasted)
