"""An answer on a terminal: Markdown that is rendered as it arrives, above a status line."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.style import Style

from kimi_mlx.cli.chat.output.chat_status import ChatStatus
from kimi_mlx.cli.chat.output.live_region import LiveRegion, Row, Size, wraps_again
from kimi_mlx.cli.chat.output.markdown_stream import MarkdownStream
from kimi_mlx.cli.chat.output.styled_line import DIM, PLAIN, Line, line_of, render_rows, split_lines, to_row, wrap_line
from kimi_mlx.cli.chat.output.terminal_text import ControlFilter
from kimi_mlx.cli.chat.output.tool_display import format_tool_call, format_tool_result
from kimi_mlx.text.messages import ToolCall, UnparsedToolCall

MIN_INTERVAL_S = 0.05
MAX_LOAD = 0.1
"""Share of the time that drawing may take: an answer that is slow to render is drawn less often."""

THINKING = "thinking"
FOLD_ROWS = 6
"""Maximum number of rows of reasoning that will be folded."""
RECENT_CHARACTERS = 2000
"""Number of characters of such reasoning that are kept: more than FOLD_ROWS of a wide terminal."""
NARROW_LINES = 12
"""Number of rows of a terminal below which no empty line stands above the status."""

BLANK = Row("", 0)
NOTE = "note"
BOLD, RED = Style(bold=True), Style(color="red")


class TextStream:
    """Plain text of one style while it arrives, with the methods of MarkdownStream.

    Args:
        style: style of the text.
    """

    def __init__(self, style: Style):
        self._style = style
        self._complete = ""
        self._partial = ""

    def feed(self, text: str) -> None:
        """Add text."""
        lines, newline, partial = text.rpartition("\n")
        if newline:
            self._complete += self._partial + lines + newline
            self._partial = ""
        self._partial += partial

    def take(self, width: int) -> list[Line]:
        """Return the lines that have become final since the last call."""
        complete, self._complete = self._complete, ""
        return wrap_text(complete[:-1], self._style, width) if complete else []

    def tail(self, width: int) -> list[Line]:
        """Return the lines that are not final."""
        return wrap_text(self._partial, self._style, width) if self._partial else []

    def finish(self, width: int) -> list[Line]:
        """Return all lines that are left."""
        lines = self.take(width) + self.tail(width)
        self._partial = ""
        return lines


class TerminalOutput:
    """Draws an answer. Rows that are final are written once; the rest is the tail of a LiveRegion.

    Args:
        console: console of the terminal.
        status: status of the chat.
        folds: whether reasoning is shown only while it lasts.
    """

    def __init__(self, console: Console, status: ChatStatus, folds: bool):
        self._console = console
        self._status = status
        self._folds = folds
        self._region = LiveRegion(console.file, lambda: terminal_size(console), wraps_again())
        self._stream: MarkdownStream | TextStream | None = None
        self._filter = ControlFilter()
        self._folded: str | None = None  # end of the reasoning that will be folded
        self._final: list[Row] = []  # rows that were not drawn yet
        self._tail: list[Row] | None = None  # of the stream; None if it must be rendered again
        self._tail_width = 0
        self._has_rows = False
        self._last: ToolCall | UnparsedToolCall | str = ""  # call or note behind which nothing came
        self._gap_is_due = False
        self._next_draw = 0.0

    def reasoning(self, text: str) -> None:
        """Continue the reasoning."""
        text = self._filter.add(text)
        if self._folds:
            self._folded = ((self._folded or "") + text)[-RECENT_CHARACTERS:]
            self._gap_is_due = True
        else:
            if self._stream is None:
                self._gap_is_due = True
                self._emit([line_of(THINKING, DIM)])
                self._stream = TextStream(DIM)
            self._stream.feed(text)
        self._tail = None

    def end_reasoning(self) -> None:
        """Remove what is folded, or show the rest."""
        self._folded = None
        self._end_stream()

    def text(self, text: str) -> None:
        """Continue the text."""
        if self._stream is None:
            self._gap_is_due = True
            self._stream = MarkdownStream()
        self._stream.feed(self._filter.add(text))
        self._tail = None

    def end_text(self) -> None:
        """Show the rest of the text."""
        self._end_stream()

    def tool_call(self, call: ToolCall | UnparsedToolCall) -> None:
        """Show a call."""
        self._gap_is_due = True
        first, *rest = ControlFilter().add(format_tool_call(call)).split("\n")
        name, bracket, arguments = first.partition("(")
        mark = line_of("● ", RED if isinstance(call, UnparsedToolCall) else PLAIN)
        width = self._width
        self._emit(wrap_line([*mark, *line_of(name, BOLD), *line_of(bracket + arguments)], width))
        self._emit(part for line in rest for part in wrap_text(line, PLAIN, width))
        self._last = call

    def tool_result(self, call: ToolCall, text: str, is_error: bool) -> None:
        """Show the beginning of a result, below its call or with its name."""
        name = "" if self._last is call else f"{call.name}: "
        shown = ControlFilter().add(f"{name}{'error: ' if is_error else ''}{format_tool_result(text)}")
        lines = wrap_text(shown, RED if is_error else DIM, self._width - 4)
        self._emit([*line_of("    " if number else "  ⎿ ", DIM), *line] for number, line in enumerate(lines))

    def note(self, renderable: RenderableType) -> None:
        """Show something of the program itself, above what is not final."""
        if self._stream is not None:
            self._emit(self._stream.take(self._width))
        self._gap_is_due = self._last is not NOTE
        self._emit_rows(render_rows(self._console, renderable, self._width))
        self._gap_is_due, self._last = True, NOTE

    def refresh(self, has_status: bool = True) -> None:
        """Draw what has changed, unless that was done too recently."""
        now = time.monotonic()
        if now >= self._next_draw:
            self._draw(has_status)
            self._next_draw = now + max(MIN_INTERVAL_S, (time.monotonic() - now) / MAX_LOAD)

    def pause(self) -> None:
        """Erase the tail until the next refresh."""
        self._take()
        self._region.update(self._final, ())
        self._final = []

    def erase(self) -> None:
        """Erase the tail."""
        self._region.close()

    def close(self) -> None:
        """Draw what is final, and erase the status line."""
        self._end_stream()
        self.pause()

    @property
    def _width(self) -> int:
        return terminal_size(self._console).columns

    def _draw(self, has_status: bool) -> None:
        size = terminal_size(self._console)
        self._take()
        tail = [*self._stream_tail(size.columns)]
        status = self._status.line(size.columns - 1) if has_status else ""
        if status:
            if size.lines >= NARROW_LINES and (self._has_rows or tail):
                tail.append(BLANK)
            tail.append(to_row(line_of(status, DIM)))
        final, self._final = self._final, []
        self._region.update(final, tail)

    def _take(self) -> None:
        if self._stream is not None:
            self._emit(self._stream.take(self._width))

    def _stream_tail(self, width: int) -> list[Row]:
        """Return the rows of what is not final."""
        if self._tail is None or self._tail_width != width:
            lines: list[Line] = []
            if self._folded is not None:
                lines = wrap_text(self._folded.strip("\n"), DIM, width)[-FOLD_ROWS:]
            elif self._stream is not None:
                lines = self._stream.tail(width)
            self._tail, self._tail_width = [to_row(line) for line in lines], width
        return [BLANK, *self._tail] if self._needs_gap(self._tail) else self._tail

    def _needs_gap(self, rows: Sequence[Row]) -> bool:
        """Return whether an empty row belongs before these rows."""
        return self._gap_is_due and self._has_rows and bool(rows) and rows[0] != BLANK

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._emit(self._stream.finish(self._width))
        self._stream = self._tail = None
        self._filter = ControlFilter()

    def _emit(self, lines: Iterable[Line]) -> None:
        self._emit_rows([to_row(line) for line in lines])

    def _emit_rows(self, rows: Sequence[Row]) -> None:
        """Add final rows, behind an empty one if it is due."""
        if not rows:
            return
        if self._needs_gap(rows):
            self._final.append(BLANK)
        self._gap_is_due, self._has_rows, self._last = False, True, ""
        self._final += rows


def wrap_text(text: str, style: Style, width: int) -> list[Line]:
    """Return plain text of one style as lines."""
    lines = split_lines(line_of(text.expandtabs(4), style))
    return [part for line in lines for part in wrap_line(line, width)]


def terminal_size(console: Console) -> Size:
    """Return the size of a terminal now, whatever COLUMNS says."""
    try:
        size = os.get_terminal_size(console.file.fileno())
    except (OSError, ValueError):  # no terminal of the system
        return Size(console.width, console.height)
    return Size(size.columns or console.width, size.lines or console.height)
