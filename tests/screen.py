"""The screen of a terminal, from what a program writes, and pictures of screens that are kept as text."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TextIO, cast

import pyte
from rich.console import Console

WRITE_VARIABLE = "WRITE_SCREENS"
"""Environment variable: if it is set, tests write their screens instead of comparing them."""


class _TrackingScreen(pyte.HistoryScreen):
    """A screen that knows which rows were changed."""

    lowest = 10**9

    @property
    def row(self) -> int:
        """Row of the cursor, counted from the first row of the scrollback."""
        return len(self.history.top) + self.cursor.y

    def draw(self, data: str) -> None:
        self.lowest = min(self.lowest, self.row)
        super().draw(data)

    def erase_in_line(self, how: int = 0, private: bool = False) -> None:
        self.lowest = min(self.lowest, self.row)
        super().erase_in_line(how, private)

    def erase_in_display(self, how: int = 0, *args: object, **options: object) -> None:
        self.lowest = min(self.lowest, self.row)
        super().erase_in_display(how, *args, **options)


class Screen(io.TextIOBase):
    """A terminal with its scrollback.

    Args:
        columns: number of columns.
        lines: number of rows.
    """

    def __init__(self, columns: int, lines: int = 24):
        super().__init__()
        self._screen = _TrackingScreen(columns, lines, history=100_000)
        self._stream = pyte.Stream(self._screen)
        self.written = ""

    def write(self, text: str, /) -> int:
        """Show a text; a line feed also returns, as the terminal driver does it."""
        self.written += text
        self._stream.feed(text.replace("\r\n", "\n").replace("\n", "\r\n"))
        return len(text)

    def flush(self) -> None:
        """Do nothing."""

    def isatty(self) -> bool:
        return True

    def resize(self, columns: int, lines: int = 24) -> None:
        """Change the size; rows are cut, not wrapped again."""
        self._screen.resize(lines, columns)

    def console(self) -> Console:
        """Return a console that writes to this terminal, in colour."""
        environment = {"TERM": "xterm-256color"}
        return Console(
            file=cast(TextIO, self),
            force_terminal=True,
            color_system="standard",
            no_color=False,
            highlight=False,
            width=self._screen.columns,
            height=self._screen.lines,
            _environ=environment,
        )

    @property
    def is_cursor_hidden(self) -> bool:
        return self._screen.cursor.hidden

    def first_changed_row(self) -> int:
        """Return the first row, counted from the start of the scrollback, that was changed since the last call."""
        lowest, self._screen.lowest = self._screen.lowest, 10**9
        return lowest

    @property
    def rows(self) -> list[str]:
        """Rows of the scrollback and the screen up to the last one with text, without spaces at their end."""
        columns = range(self._screen.columns)
        scrolled = ["".join(line[column].data for column in columns) for line in self._screen.history.top]
        rows = [row.rstrip() for row in [*scrolled, *self._screen.display]]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    @property
    def text(self) -> str:
        return "\n".join(self.rows)


def check_screens(folder: Path, name: str, screens: dict[str, str]) -> None:
    """Compare screens with a file of the folder, or write it if WRITE_VARIABLE is set.

    Args:
        folder: folder of the files.
        name: name of the scene and of its file.
        screens: title of each screen, such as `40 columns`, and its text.
    """
    text = "\n".join(f"===== {title}\n{screen}\n" for title, screen in screens.items())
    file = folder / f"{name}.txt"
    if os.environ.get(WRITE_VARIABLE):
        folder.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    expected = file.read_text(encoding="utf-8") if file.exists() else ""
    assert text == expected, f"run this test with {WRITE_VARIABLE}=1, and look at the changes of {file.name}"
