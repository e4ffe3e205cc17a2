"""Lines of styled text: cut, wrapped, and written as rows of the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

from rich.color import ColorSystem
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.style import Style

from kimi_mlx.cli.chat.output.live_region import Row
from kimi_mlx.cli.chat.output.terminal_text import cell_width, fold_points, remove_controls, wrap_points

Line: TypeAlias = "list[Segment]"
"""Styled text without newlines."""

PLAIN = Style()
DIM = Style(dim=True)


def line_of(text: str, style: Style = PLAIN) -> Line:
    """Return a text as a line of one style."""
    return [Segment(text, style)] if text else []


def plain_text(line: Iterable[Segment]) -> str:
    """Return the text of a line."""
    return "".join(segment.text for segment in line)


def line_width(line: Iterable[Segment]) -> int:
    """Return the number of cells of a line."""
    return cell_width(plain_text(line))


def split_lines(segments: Iterable[Segment]) -> list[Line]:
    """Split styled text at its newlines."""
    lines: list[Line] = [[]]
    for text, style, _ in segments:
        first, *rest = text.split("\n")
        if first:
            lines[-1].append(Segment(first, style))
        lines.extend([Segment(part, style)] if part else [] for part in rest)
    return lines


def wrap_line(line: Line, width: int) -> list[Line]:
    """Wrap a line at words; see wrap_points."""
    return _cut(line, wrap_points(plain_text(line), width))


def fold_line(line: Line, width: int) -> list[Line]:
    """Break a line wherever it is full, and keep all its spaces."""
    return _cut(line, fold_points(plain_text(line), width))


def without_start(line: Line, length: int) -> Line:
    """Return a line without its first characters."""
    return _cut(line, [(length, len(plain_text(line)))])[0]


def to_row(line: Iterable[Segment]) -> Row:
    """Return a line as a row of the screen, with ANSI colours; no character of its text can control the terminal."""
    shown = [(remove_controls(text).replace("\n", " ").replace("\t", " "), style) for text, style, _ in line]
    parts = [style.render(text, color_system=ColorSystem.STANDARD) if style else text for text, style in shown]
    return Row("".join(parts), cell_width("".join(text for text, _ in shown)))


def render_rows(console: Console, renderable: RenderableType, width: int) -> list[Row]:
    """Return what Rich renders as rows of the screen."""
    options = console.options.update(width=width, height=None)
    lines = console.render_lines(renderable, options, pad=False)
    return [to_row(segment for segment in line if not segment.control) for line in lines]


def _cut(line: Line, points: Sequence[tuple[int, int]]) -> list[Line]:
    """Return parts of a line.

    Args:
        line: styled text.
        points: (start, end) of each part, in order.
    """
    if len(points) == 1 and points[0] == (0, len(plain_text(line))):
        return [line]
    parts: list[Line] = []
    index = offset = 0  # the current segment, and where it starts
    for start, end in points:
        part: Line = []
        while index < len(line) and offset + len(line[index].text) <= start:
            offset += len(line[index].text)
            index += 1
        position, at = offset, index
        while at < len(line) and position < end:
            text, style, _ = line[at]
            piece = text[max(0, start - position) : end - position]
            if piece:
                part.append(Segment(piece, style))
            position += len(text)
            at += 1
        parts.append(part)
    return parts
