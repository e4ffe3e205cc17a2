"""An answer as plain text: for pipes and files, and for terminals that show nothing else."""

from __future__ import annotations

import os
import stat
from typing import IO

from rich.console import Console, RenderableType
from rich.text import Text

from kimi_mlx.cli.chat.output.chat_status import ChatStatus
from kimi_mlx.cli.chat.output.live_region import LiveRegion, Row, Size, is_terminal, wraps_again
from kimi_mlx.cli.chat.output.terminal_text import ControlFilter, cell_width
from kimi_mlx.cli.chat.output.tool_display import format_tool_call, format_tool_result
from kimi_mlx.text.messages import ToolCall, UnparsedToolCall


class PlainOutput:
    """Writes the text of an answer as it is, and everything else to another console.

    A terminal gets no control sequence of the text; a pipe or a file gets every character. A status line stands on a
    terminal of the other console until the text begins, or to the end if the text goes to a file.

    Args:
        console: console of the text.
        notes: console of reasoning, tool calls, notes and the status line.
        status: status of the chat.
        folds: whether reasoning is not shown.
    """

    def __init__(self, console: Console, notes: Console, status: ChatStatus, folds: bool):
        self._file: IO[str] = console.file
        self._notes = notes
        self._status = status
        self._folds = folds
        self._filter = ControlFilter() if self._file.isatty() else None
        self._reasoning_filter = ControlFilter()
        self._is_beside_text = self._file.isatty() or not notes.is_terminal or _is_pipe(self._file)
        self._ends_with_newline = True
        self._notes_end_with_newline: bool | None = None  # None: no reasoning is being written
        self._region = status_region(notes)
        self._hides_status = False

    def reasoning(self, text: str) -> None:
        """Continue the reasoning."""
        if self._folds:
            return
        self._close_status()
        self._hides_status = True
        if self._notes_end_with_newline is None:
            text = f"thinking:\n{text}"  # as text too, for terminals that cannot dim
        self._write_note(self._reasoning_filter.add(text))

    def end_reasoning(self) -> None:
        """End the reasoning."""
        if self._notes_end_with_newline is not None:
            self._write_note("\n" if self._notes_end_with_newline else "\n\n")
            self._notes_end_with_newline, self._hides_status = None, False

    def text(self, text: str) -> None:
        """Continue the text of the answer."""
        if self._is_beside_text:
            self._close_status()
            self._hides_status = True
        shown = self._filter.add(text) if self._filter else text
        if shown:
            self._file.write(shown)
            self._file.flush()
            self._ends_with_newline = shown.endswith("\n")

    def end_text(self) -> None:
        """End the last line of the text."""
        if not self._ends_with_newline:
            self._file.write("\n")
            self._file.flush()
            self._ends_with_newline = True
        self._hides_status = self._hides_status and self._filter is None  # a reader of a pipe may write at any time

    def tool_call(self, call: ToolCall | UnparsedToolCall) -> None:
        """Show a call."""
        kind = "" if isinstance(call, UnparsedToolCall) else "tool call "
        self.note(Text(ControlFilter().add(f"{kind}{format_tool_call(call)}")))

    def tool_result(self, call: ToolCall, text: str, is_error: bool) -> None:
        """Show the beginning of a result."""
        shown = f"{'error' if is_error else 'result'} of {call.name}: {format_tool_result(text)}"
        self.note(Text(ControlFilter().add(shown), style="dim"))

    def note(self, renderable: RenderableType) -> None:
        """Show something of the program itself, on a line of its own."""
        self._close_status()
        if self._is_beside_text and self._notes.is_terminal and not self._ends_with_newline:
            self._notes.print()  # the text continues in the middle of its line
        self._notes.print(renderable, soft_wrap=not self._notes.is_terminal)

    def refresh(self, has_status: bool = True) -> None:
        """Draw the status line."""
        if self._region is None or self._hides_status or not has_status:
            return
        line = self._status.line(self._notes.width - 1)
        self._region.update((), [Row(line, cell_width(line))] if line else [])

    def pause(self) -> None:
        """Leave the terminal to others until the next output."""
        self._close_status()

    def erase(self) -> None:
        """Erase the status line."""
        self._close_status()

    def close(self) -> None:
        """End the last lines and remove the status line."""
        self._close_status()
        self.end_reasoning()
        self.end_text()

    def _write_note(self, text: str) -> None:
        if text:
            self._notes.print(Text(text, style="dim"), end="", soft_wrap=True)
            self._notes_end_with_newline = text.endswith("\n")

    def _close_status(self) -> None:
        if self._region is not None:
            self._region.close()


def status_region(console: Console) -> LiveRegion | None:
    """Return a region for a status line; None if the console is no terminal that has one."""
    if not is_terminal(console):
        return None
    return LiveRegion(console.file, lambda: Size(console.width, console.height), wraps_again())


def _is_pipe(file: IO[str]) -> bool:
    """Return whether a file is a pipe, whose reader may write to the same terminal."""
    try:
        return stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):  # no file of the system
        return False
