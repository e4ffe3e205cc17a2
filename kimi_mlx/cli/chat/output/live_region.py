"""A terminal with a short tail that is redrawn, below output that is only appended.

Escape sequences: ECMA-48 (cursor, erase), DECAWM (mode 7, wrapping at the edge), DECTCEM (mode 25, cursor), and
synchronized output (mode 2026, https://contour-terminal.org/vt-extensions/synchronized-output/).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from rich.console import Console

BEGIN, END = "\x1b[?2026h\x1b[?7l", "\x1b[?7h\x1b[?2026l"
"""What surrounds each update: the terminal shows it as a whole and wraps no row, whatever it measures."""
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
ERASE_LINE, ERASE_BELOW = "\x1b[2K", "\x1b[J"


class Row(NamedTuple):
    """One row of the screen.

    Args:
        text: text with the escape sequences of its style, which it also ends.
        width: width in cells.
    """

    text: str
    width: int


class Size(NamedTuple):
    """Size of a terminal in cells."""

    columns: int
    lines: int


class Writable(Protocol):
    """A file of a terminal."""

    def write(self, text: str, /) -> object:
        """Write a text."""
        ...

    def flush(self) -> object:
        """Send what was written."""
        ...


class LiveRegion:
    """The end of a terminal's output: rows that stay, and below them a tail that is redrawn.

    The cursor is at the start of the tail's last row, and never goes above the tail's first row. A row that is equal
    to the one on the screen is not written again.

    Args:
        file: file of the terminal.
        size: function that returns the size of the terminal.
        wraps_again: whether the terminal wraps its rows again when it becomes narrower.
    """

    def __init__(self, file: Writable, size: Callable[[], Size], wraps_again: bool = True):
        self._file = file
        self._size = size
        self._wraps_again = wraps_again
        self._tail: list[Row] = []
        self._drawn_size = size()

    @property
    def max_tail(self) -> int:
        """Maximum number of rows of the tail: all but one of the screen."""
        return max(1, self._size().lines - 1)

    def update(self, finished: Sequence[Row], tail: Sequence[Row]) -> None:
        """Append rows above the tail, and replace the tail.

        Args:
            finished: rows that are never written again.
            tail: new tail; of more than `max_tail` rows, the last ones.
        """
        size = self._size()
        tail = list(tail)[-max(1, size.lines - 1) :]
        rows = [*finished, *tail]
        if size != self._drawn_size:
            start, output = 0, self._to_top(size)
            self._drawn_size, self._tail = size, []
        else:
            start = _num_equal(self._tail, rows)
            if start == len(rows) == len(self._tail) and (tail or not self._tail):
                self._tail = tail
                return
            if tail:
                start = min(start, len(rows) - 1)
            output = self._to_row(start)
        output += self._rows_from(start, rows, bool(tail))
        if tail and not self._tail:
            output = HIDE_CURSOR + output
        elif not tail:
            output += SHOW_CURSOR
        self._tail = tail
        self._file.write(BEGIN + output + END)
        self._file.flush()

    def close(self) -> None:
        """Erase the tail; the cursor is where the next output belongs."""
        if self._tail:
            self.update((), ())

    def _to_top(self, size: Size) -> str:
        """Return the way to the first row of the tail after the size has changed; everything below is erased."""
        above = self._tail[:-1]
        heights = [max(1, -(-row.width // size.columns)) if self._wraps_again else 1 for row in above]
        return _up(min(sum(heights), size.lines - 1)) + ERASE_BELOW

    def _to_row(self, index: int) -> str:
        """Return the way from the last row of the tail to another one, which may be the next new row."""
        last = max(0, len(self._tail) - 1)
        return "\r\n" * (index - last) if index > last else _up(last - index)

    def _rows_from(self, start: int, rows: Sequence[Row], has_tail: bool) -> str:
        """Return the output of rows, from the start of row `start` to the start of the last one of the tail."""
        parts: list[str] = []
        for index in range(start, len(rows)):
            row = rows[index]
            is_old = index < len(self._tail)
            if not is_old or self._tail[index] != row:
                # erased as a whole, before: tmux would keep spaces behind a shorter row, and wrap them again
                parts += [ERASE_LINE if is_old and self._tail[index].text else "", row.text]
            if index < len(rows) - 1 or not has_tail:
                parts.append("\r\n")
        if len(self._tail) > len(rows):
            parts.append(f"\r\n{ERASE_BELOW}{_up(1)}" if has_tail else ERASE_BELOW)
        return "".join(parts) + "\r"


def wraps_again(environment: Mapping[str, str] | None = None) -> bool:
    """Return whether the terminal wraps its rows again when it becomes narrower, by its environment variables.

    Most terminals do. xterm, the Linux console and GNU screen cut the rows off.
    """
    variables = os.environ if environment is None else environment
    term = variables.get("TERM", "")
    is_tmux = bool(variables.get("TMUX"))
    return is_tmux or not ("XTERM_VERSION" in variables or term == "linux" or term.startswith("screen"))


def is_terminal(console: Console) -> bool:
    """Return whether a console is a terminal whose cursor can be moved, whatever FORCE_COLOR says."""
    return console.is_terminal and not console.is_dumb_terminal and console.file.isatty()


def _num_equal(old: Sequence[Row], new: Sequence[Row]) -> int:
    """Return the number of equal rows at the start of both."""
    count = 0
    for before, after in zip(old, new, strict=False):
        if before != after:
            break
        count += 1
    return count


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows else ""
