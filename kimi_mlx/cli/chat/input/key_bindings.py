"""Keys of the line editor, in addition to those of Emacs or vi."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.application import get_app, run_in_terminal
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.enums import EditingMode
from prompt_toolkit.filters import (
    Condition,
    completion_is_selected,
    emacs_mode,
    has_focus,
    is_searching,
    vi_navigation_mode,
)
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.key_binding.vi_state import InputMode
from prompt_toolkit.keys import Keys
from prompt_toolkit.search import stop_search

from kimi_mlx.cli.chat.files.media_files import is_media_file
from kimi_mlx.cli.chat.input.dropped_files import split_dropped_files
from kimi_mlx.cli.chat.input.pasted_blocks import MAX_SHOWN, PastedBlocks, to_line_feeds

BUFFER_NAME = "message"
_EDITING_MODE = re.compile(r"^\s*set\s+editing-mode\s+(\w+)", re.MULTILINE)


def create_key_bindings(blocks: PastedBlocks, edit: Callable[[Buffer], None]) -> KeyBindings:
    """Return the keys of the line editor.

    Args:
        blocks: pasted blocks.
        edit: function that opens the user's text editor for the edited text.
    """
    bindings = KeyBindings()
    at_message = has_focus(BUFFER_NAME) & ~is_searching
    is_empty = Condition(lambda: not get_app().current_buffer.text)

    @bindings.add("enter", filter=at_message & completion_is_selected)
    def close_menu(event: KeyPressEvent) -> None:
        event.current_buffer.complete_state = None

    @bindings.add("enter", filter=at_message & ~completion_is_selected)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_continued(buffer.document.text_before_cursor) and buffer.document.is_cursor_at_the_end:
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif buffer.text.strip():
            buffer.validate_and_handle()
        else:
            buffer.reset()

    @bindings.add("escape", "enter", filter=at_message & emacs_mode)
    @bindings.add("c-j", filter=at_message)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add(Keys.BracketedPaste, filter=at_message)
    def paste(event: KeyPressEvent) -> None:
        text = to_line_feeds(event.data)
        event.current_buffer.insert_text(text if _is_dropped(text) else blocks.add(text))

    @bindings.add(Keys.Vt100MouseEvent)
    def ignore(event: KeyPressEvent) -> None:
        """Do nothing: the mouse is the terminal's; prompt_toolkit fails at what only looks like an event of it."""

    @bindings.add("c-x", "c-e", filter=at_message & emacs_mode)
    @bindings.add("v", filter=at_message & vi_navigation_mode)
    def open_editor(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        run_in_terminal(lambda: edit(buffer))

    @bindings.add("c-c", filter=at_message)
    @bindings.add("<sigint>")
    def interrupt(event: KeyPressEvent) -> None:
        if event.app.current_buffer.text:
            event.app.erase_when_done = True  # remove the message from the screen
            event.app.exit(result="")
        else:
            event.app.exit(exception=KeyboardInterrupt())

    @bindings.add("c-c", filter=is_searching)
    def end_search(event: KeyPressEvent) -> None:
        """Clear the message, as Ctrl-C does elsewhere; what the search has found would stay otherwise."""
        stop_search()
        event.current_buffer.reset()
        event.app.vi_state.input_mode = InputMode.INSERT

    @bindings.add("c-d", filter=at_message & is_empty)
    def end(event: KeyPressEvent) -> None:
        event.app.exit(exception=EOFError())

    @bindings.add("c-z", filter=at_message)
    def suspend(event: KeyPressEvent) -> None:
        event.app.suspend_to_background()

    return bindings


def _is_dropped(text: str) -> bool:
    """Return whether a pasted text is nothing but paths of images and videos, as if they were dropped."""
    parts = split_dropped_files(text, is_media_file) if len(text) <= MAX_SHOWN else []
    return bool(parts) and all(isinstance(part, Path) for part in parts)


def is_continued(line: str) -> bool:
    """Return whether a line ends in a single backslash."""
    return line.endswith("\\") and not line.endswith("\\\\")


def editing_mode() -> EditingMode:
    """Return the mode that readline has: vi with `set editing-mode vi` in ~/.inputrc, or in the file INPUTRC."""
    path = Path(os.environ.get("INPUTRC") or "~/.inputrc")
    try:
        settings = _EDITING_MODE.findall(path.expanduser().read_text(encoding="utf-8", errors="replace"))
    except (OSError, RuntimeError, ValueError):  # no file, no home folder
        return EditingMode.EMACS
    return EditingMode.VI if settings and settings[-1] == "vi" else EditingMode.EMACS
