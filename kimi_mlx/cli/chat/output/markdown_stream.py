"""Markdown while it arrives: lines that are final, and a tail that may still change."""

from __future__ import annotations

from markdown_it.tree import SyntaxTreeNode

from kimi_mlx.cli.chat.output.code_highlight import CodeHighlighter
from kimi_mlx.cli.chat.output.markdown_blocks import Renderer, is_blank, is_closed, start_line
from kimi_mlx.cli.chat.output.markdown_parser import close_markup, make_parser, parse
from kimi_mlx.cli.chat.output.styled_line import Line


class MarkdownStream:
    """Renders Markdown in pieces: whole blocks, and lines of code.

    A piece is final when no further text can change it, and then its source is dropped as far as the parser can start
    again behind it: at a block, at an item of a list that is not nested, at a line of code. The final lines are the
    same wherever the text was cut.
    """

    def __init__(self) -> None:
        self._parser = make_parser()
        self._source = ""  # complete lines of pieces that are not final, with what the parser needs before them
        self._partial = ""  # a line that is not complete
        self._new = False  # whether there are complete lines that were not parsed
        self._num_done = 0  # pieces of the source that are final
        self._needs_gap = False
        self._first_number: int | None = None
        self._highlighter: CodeHighlighter | None = None

    def feed(self, text: str) -> None:
        """Add text; it is rendered by the next take() or tail()."""
        lines, newline, partial = text.rpartition("\n")
        if newline:
            self._source += self._partial + lines + newline
            self._partial = partial
            self._new = True
        else:
            self._partial += partial

    def take(self, width: int) -> list[Line]:
        """Return the lines that have become final since the last call, for a terminal of a width in cells."""
        if not self._new:
            return []
        self._new = False
        return self._render(width, is_over=False)

    def finish(self, width: int) -> list[Line]:
        """Return all lines that are left; the text has ended."""
        if self._partial:
            self.feed("\n")
        return self._render(width, is_over=True)

    def tail(self, width: int) -> list[Line]:
        """Return the lines that are not final, with unfinished markup closed. Call take() before."""
        text = close_markup(self._source + self._partial) if self._partial else self._source
        if not text.strip():
            return []
        renderer = self._renderer(text, width, is_complete=not self._partial)
        renderer.highlighter = self._highlighter.copy() if self._highlighter else None
        renderer.render(parse(self._parser, text), is_open=True)
        return [line for piece in renderer.pieces[self._num_done :] for line in piece.lines]

    def _renderer(self, text: str, width: int, is_complete: bool) -> Renderer:
        lines = text.split("\n")
        return Renderer(
            lines[:-1] if is_complete else lines,
            width,
            self._num_done,
            self._highlighter,
            is_complete,
            self._needs_gap,
            self._first_number,
        )

    def _render(self, width: int, is_over: bool) -> list[Line]:
        """Return the lines of pieces that are final now, and drop their source."""
        blocks = parse(self._parser, self._source)
        renderer = self._renderer(self._source, width, is_complete=True)
        renderer.render(blocks, is_open=not is_over)
        pieces = renderer.pieces
        num_final = next((number for number, piece in enumerate(pieces) if piece.is_open), len(pieces))
        lines = [line for piece in pieces[self._num_done : num_final] for line in piece.lines]
        self._highlighter = renderer.highlighter
        self._num_done = num_final
        if blocks:
            self._drop(blocks, renderer)
        else:
            self._source = ""
        return lines

    def _drop(self, blocks: list[SyntaxTreeNode], renderer: Renderer) -> None:
        """Drop the source of final pieces, up to the last place where the parser can start again."""
        lines = self._source.split("\n")[:-1]
        last, start = blocks[-1], start_line(blocks[-1])
        if self._num_done == len(renderer.pieces) and last.type not in ("bullet_list", "ordered_list", "blockquote"):
            is_open_code = last.type in ("fence", "math_block") and not is_closed(last)
            self._keep(lines[start : start + 1] if is_open_code else [], int(is_open_code), needs_gap=True)
            return
        if renderer.starts[start]:
            self._num_done -= renderer.starts[start]
            self._keep(lines[start:], self._num_done, needs_gap=True)
        if last.type in ("bullet_list", "ordered_list") and len(last.children) > 1:
            item = start_line(last.children[-1])
            number = renderer.numbers.get(item)
            done = self._num_done - renderer.starts[item] + renderer.starts[start]
            self._keep(lines[item:], done, needs_gap=is_blank(lines[item - 1]), first_number=number)

    def _keep(self, lines: list[str], num_done: int, needs_gap: bool, first_number: int | None = None) -> None:
        self._source = "".join(f"{line}\n" for line in lines)
        self._num_done, self._needs_gap, self._first_number = num_done, needs_gap, first_number
