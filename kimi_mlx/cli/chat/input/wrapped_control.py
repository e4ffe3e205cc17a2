"""The edited text, wrapped between words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

from prompt_toolkit.data_structures import Point
from prompt_toolkit.formatted_text import StyleAndTextTuples, fragment_list_to_text
from prompt_toolkit.layout.controls import BufferControl, GetLinePrefixCallable, UIContent
from prompt_toolkit.layout.screen import Char
from prompt_toolkit.layout.utils import explode_text_fragments
from prompt_toolkit.utils import get_cwidth


class WrappedControl(BufferControl):
    """A buffer whose long lines are wrapped between words; each row is a line of the window.

    A window that wraps lines itself shows nothing but the last line, and empty space, if the line before it has more
    rows than the window. With rows as lines it scrolls by rows.
    """

    def create_content(self, width: int, height: int, preview_search: bool = False) -> UIContent:
        """Return the rows."""
        content = super().create_content(width, height, preview_search)
        rows: list[StyleAndTextTuples] = []
        first_rows: list[int] = []  # of each line
        starts: list[Sequence[int]] = []  # positions of the rows of each line
        for number in range(content.line_count):
            line = content.get_line(number)
            starts.append(row_starts(fragment_list_to_text(line), width))
            first_rows.append(len(rows))
            if len(starts[-1]) == 1:
                rows.append(line)
            else:
                line = explode_text_fragments(line)
                ends = [*starts[-1][1:], len(line)]
                rows += [line[start:end] for start, end in zip(starts[-1], ends, strict=True)]

        def to_row(point: Point) -> Point:
            row = bisect_right(starts[point.y], point.x) - 1
            return Point(point.x - starts[point.y][row], first_rows[point.y] + row)

        menu = content.menu_position
        return UIContent(
            rows.__getitem__,
            len(rows),
            to_row(content.cursor_position),
            None if menu is None else to_row(menu),
            content.show_cursor,
        )

    def preferred_height(
        self, width: int, max_available_height: int, wrap_lines: bool, get_line_prefix: GetLinePrefixCallable | None
    ) -> int | None:
        """Return the number of rows."""
        return self.create_content(width, 1).line_count


@lru_cache(4096)  # of each line, for each key that is pressed
def row_starts(line: str, width: int) -> Sequence[int]:
    """Return the positions at which the rows of a line begin.

    Args:
        line: line without line ends.
        width: number of columns of a row.
    """
    starts = [0]
    column = 0
    word = 0  # start of the current word
    for position, character in enumerate(line):
        columns = num_columns(character)
        if column + columns > width and position > starts[-1]:
            starts.append(word if word > starts[-1] else position)
            column = sum(num_columns(moved) for moved in line[starts[-1] : position])
            if column + columns > width:  # the word fills a row
                starts.append(position)
                column = 0
        column += columns
        if character == " ":
            word = position + 1
    return starts


def num_columns(character: str) -> int:
    """Return the number of columns of a character on the screen; control characters are shown as `^A`."""
    return get_cwidth(Char.display_mappings.get(character, character))
