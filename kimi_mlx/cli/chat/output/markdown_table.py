"""Tables of Markdown: a grid if it fits the width, else a list of records."""

from __future__ import annotations

from collections.abc import Sequence

from rich.segment import Segment
from rich.style import Style

from kimi_mlx.cli.chat.output.styled_line import DIM, PLAIN, Line, line_of, line_width, plain_text, wrap_line
from kimi_mlx.cli.chat.output.terminal_text import cell_width

HEAD = Style(bold=True)
SEPARATOR, CROSSING = " │ ", "─┼─"
MIN_COLUMN = 8
"""Width to which a column may shrink: its words are cut, or it has none longer than this."""


def table_lines(rows: Sequence[Sequence[Sequence[Line]]], aligns: Sequence[str], width: int) -> list[Line]:
    """Return a table as lines.

    Args:
        rows: lines of the cells of each row; the first row is the head.
        aligns: `left`, `right` or `center` of each column.
        width: maximum number of cells of a line.
    """
    head, *body = rows
    head = [[_with_style(line, HEAD) for line in cell] for cell in head]
    widths = _column_widths([head, *body], width - len(SEPARATOR) * (len(head) - 1))
    if widths is None:
        return _records(head, body, width)
    lines = _grid_row(head, widths, aligns)
    lines.append(line_of(CROSSING.join("─" * column for column in widths), DIM))
    is_tall = any(len(_wrap(cell, column)) > 1 for row in body for cell, column in zip(row, widths, strict=True))
    for number, row in enumerate(body):
        if number and is_tall:
            lines.append(line_of(CROSSING.join("─" * column for column in widths), DIM))
        lines += _grid_row(row, widths, aligns)
    return lines


def _column_widths(rows: Sequence[Sequence[Sequence[Line]]], room: int) -> list[int] | None:
    """Return the width of each column; None if the words do not fit.

    Wide columns shrink first, but none below its longest word, or MIN_COLUMN if that is longer.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(1, *(line_width(line) for cell in column for line in cell)) for column in columns]
    words = [_longest_word(column) for column in columns]
    least = [min(width, max(MIN_COLUMN, word)) for width, word in zip(widths, words, strict=True)]
    if sum(least) > room:
        least = [min(width, MIN_COLUMN) for width in widths]
        if sum(least) > room or any(word > 2 * MIN_COLUMN for word in words):
            return None
    while (excess := sum(widths) - room) > 0:
        widest = max(range(len(widths)), key=lambda index: (widths[index] > least[index], widths[index]))
        others = [width for index, width in enumerate(widths) if index != widest and width < widths[widest]]
        target = max(least[widest], widths[widest] - excess, min(max(others, default=0), widths[widest] - 1))
        widths[widest] = min(target, widths[widest] - 1)
    return [
        max(line_width(line) for cell in column for line in _wrap(cell, width) or [[]])
        for column, width in zip(columns, widths, strict=True)
    ]


def _longest_word(column: Sequence[Sequence[Line]]) -> int:
    texts = [plain_text(line) for cell in column for line in cell]
    return max((cell_width(word) if word.isascii() else 2 for text in texts for word in text.split()), default=1)


def _grid_row(row: Sequence[Sequence[Line]], widths: Sequence[int], aligns: Sequence[str]) -> list[Line]:
    cells = [_wrap(cell, column) for cell, column in zip(row, widths, strict=True)]
    lines: list[Line] = []
    for number in range(max(len(cell) for cell in cells)):
        line: Line = []
        for index, (cell, column) in enumerate(zip(cells, widths, strict=True)):
            is_last = index == len(cells) - 1
            content = cell[number] if number < len(cell) else []
            line += _aligned(content, column, aligns[index], is_last)
            line += [] if is_last else line_of(SEPARATOR, DIM)
        lines.append(line)
    return lines


def _aligned(line: Line, width: int, align: str, is_last: bool) -> Line:
    """Return a line with spaces around it; none behind the last column."""
    spaces = max(0, width - line_width(line))
    left = {"right": spaces, "center": spaces // 2}.get(align, 0)
    right = 0 if is_last else spaces - left
    return [*line_of(" " * left), *line, *line_of(" " * right)]


def _records(head: Sequence[Sequence[Line]], body: Sequence[Sequence[Sequence[Line]]], width: int) -> list[Line]:
    """Return each row as lines `head: cell`, with a rule between two rows."""
    lines: list[Line] = []
    for number, row in enumerate(body):
        if number:
            lines.append(line_of("─" * min(width, 20), DIM))
        for name, cell in zip(head, row, strict=True):
            label = [*(segment for line in name for segment in line), Segment(": ", PLAIN)]
            lines += wrap_line([*label, *(segment for line in cell for segment in line)], width)
    return lines or [part for cell in head for part in _wrap(cell, width)]


def _wrap(cell: Sequence[Line], width: int) -> list[Line]:
    return [part for line in cell for part in wrap_line(line, width)]


def _with_style(line: Line, style: Style) -> Line:
    return [Segment(segment.text, style + (segment.style or PLAIN)) for segment in line]
