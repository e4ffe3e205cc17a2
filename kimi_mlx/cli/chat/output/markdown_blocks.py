"""Blocks of Markdown as lines of styled text, in pieces that are finished one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote

from markdown_it.tree import SyntaxTreeNode
from rich.segment import Segment
from rich.style import Style

from kimi_mlx.cli.chat.output.code_highlight import CodeHighlighter
from kimi_mlx.cli.chat.output.markdown_table import table_lines
from kimi_mlx.cli.chat.output.styled_line import (
    DIM,
    PLAIN,
    Line,
    fold_line,
    line_of,
    line_width,
    plain_text,
    split_lines,
    without_start,
    wrap_line,
)
from kimi_mlx.cli.chat.output.terminal_text import remove_controls, shorten

CODE = Style(color="cyan")
INLINE_STYLES = {
    "em": Style(italic=True),
    "strong": Style(bold=True),
    "s": Style(strike=True),
    "link": Style(underline=True),
}
HEADINGS = {
    "h1": Style(bold=True, underline=True, color="bright_blue"),
    "h2": Style(bold=True, color="bright_blue"),
}
OTHER_HEADING = Style(bold=True)
BULLETS = "•◦▪"
TASK = re.compile(r"\[([ xX])\] ")
TASKS = {" ": "☐", "x": "☑", "X": "☑"}
MIN_WIDTH = 10
"""Minimum number of cells of text inside nested lists and quotes; prefixes are cut to leave it."""
RULE_WIDTH = 40
TAB = "    "


@dataclass
class Piece:
    """A part of a document that is shown as a whole: a paragraph, a table, one line of code.

    Args:
        lines: lines that fit the width.
        is_open: whether further text may change it.
    """

    lines: list[Line]
    is_open: bool = False


@dataclass
class Margin:
    """What stands before the lines of a block: bullets, numbers, bars of quotes.

    Args:
        outer: margin around it; None at the top.
        first: prefix of the first line.
        rest: prefix of the other lines.
    """

    outer: Margin | None = None
    first: Line = field(default_factory=list[Segment])
    rest: Line = field(default_factory=list[Segment])

    @property
    def width(self) -> int:
        """Number of cells of the prefixes."""
        return line_width(self.rest) + (self.outer.width if self.outer else 0)

    def next(self) -> Line:
        """Return the prefix of the next line."""
        prefix, self.first = self.first or self.rest, []
        return [*(self.outer.next() if self.outer else ()), *prefix]

    def blank(self) -> Line:
        """Return the prefix of an empty line, without spaces at its end."""
        line = [*(self.outer.blank() if self.outer else ()), *self.rest]
        return line if plain_text(line).strip() else []


class Renderer:
    """Renders blocks to pieces.

    Args:
        source: lines of the text that was parsed.
        width: number of cells of a line.
        num_done: number of pieces that were shown before; they get no lines.
        highlighter: colours of the code that continues from a piece that was shown; complete lines advance it.
        is_complete: whether the source ends with a complete line.
        needs_gap: whether an empty line stands before the first block.
        first_number: number of the first item, if the source starts inside a numbered list.

    Attributes:
        pieces: pieces in order.
        starts: source line of a block, or of an item of a list at the top -> number of pieces before it.
        numbers: source line of an item of a numbered list at the top -> its number.
        highlighter: colours of the last code.
    """

    def __init__(
        self,
        source: Sequence[str],
        width: int,
        num_done: int = 0,
        highlighter: CodeHighlighter | None = None,
        is_complete: bool = True,
        needs_gap: bool = False,
        first_number: int | None = None,
    ):
        self.pieces: list[Piece] = []
        self.starts: dict[int, int] = {}
        self.numbers: dict[int, int] = {}
        self.highlighter = highlighter
        self._source = source
        self._width = width
        self._num_done = num_done
        self._is_complete = is_complete
        self._gap: Line | None = [] if needs_gap else None  # empty line that is due before the next piece
        self._first_number = first_number
        self._list_depth = 0
        self._task_length = 0  # of the box that the next paragraph begins with

    def render(self, blocks: Sequence[SyntaxTreeNode], is_open: bool) -> None:
        """Render the blocks of a document.

        Args:
            blocks: blocks of the parser.
            is_open: whether the last block may continue.
        """
        margin = Margin()
        for number, block in enumerate(blocks):
            self.starts[start_line(block)] = len(self.pieces)
            self._block(block, margin, is_open and number == len(blocks) - 1)
            self._gap = []

    def _block(self, node: SyntaxTreeNode, margin: Margin, is_open: bool) -> None:
        if node.type in ("bullet_list", "ordered_list"):
            self._list(node, margin, is_open)
        elif node.type == "blockquote":
            bar = line_of("▌ ", DIM)
            self._blocks(node.children, Margin(margin, bar, bar), is_open)
        elif node.type in ("fence", "math_block"):
            self._code(node, margin, is_open)
        else:
            lines = self._leaf_lines(node, self._room(margin))
            self._add(lines, margin, is_open and not self._is_done(node))

    def _blocks(self, nodes: Sequence[SyntaxTreeNode], margin: Margin, is_open: bool) -> None:
        """Render blocks inside a list item or a quote; an empty line of the source between them is kept."""
        if not nodes:
            self._add([[]], margin, is_open)
        for number, node in enumerate(nodes):
            if number and self._is_after_blank(node):
                self._gap = margin.blank()
            self._block(node, margin, is_open and number == len(nodes) - 1)

    def _list(self, node: SyntaxTreeNode, margin: Margin, is_open: bool) -> None:
        is_top = margin.outer is None
        number = int(node.attrs.get("start", 1)) if node.type == "ordered_list" else None
        if is_top and number is not None and self._first_number is not None:
            number = self._first_number
        self._first_number = None
        bullet = BULLETS[min(self._list_depth, len(BULLETS) - 1)]
        self._list_depth += 1
        for index, item in enumerate(node.children):
            if index and self._is_after_blank(item):
                self._gap = margin.blank()
            if is_top:
                self.starts[start_line(item)] = len(self.pieces)
                if number is not None:
                    self.numbers[start_line(item)] = number + index
            label = f"{bullet} " if number is None else f"{number + index}. "
            if task := _task_of(item):
                self._task_length, label = len(task), f"{TASKS[task[1]]} "
            inner = Margin(margin, line_of(label), line_of(" " * len(label)))
            self._blocks(item.children, inner, is_open and index == len(node.children) - 1)
        self._list_depth -= 1

    def _code(self, node: SyntaxTreeNode, margin: Margin, is_open: bool) -> None:
        """Render a fence: a line above, a piece per line of code, and a line below if it has ended."""
        code = node.content.split("\n")[:-1]
        has_end = is_closed(node)
        is_math = node.type == "math_block"
        language = "" if is_math else node.info.split(" ")[0].split("{")[0]
        is_new = len(self.pieces) >= self._num_done
        opening, closing = (node.info, node.markup) if is_math else (f"╭─ {language}".rstrip(), "╰─")
        width = self._room(margin)
        heading = line_of(shorten(remove_controls(opening), width), DIM)
        self._add([heading], margin, is_open and not self._is_complete and not code)
        if is_new or self.highlighter is None:
            self.highlighter = CodeHighlighter(language)
        for number, line in enumerate(code):
            is_partial = not self._is_complete and is_open and not has_end and number == len(code) - 1
            if is_partial and node.markup.startswith(line.strip()):
                return  # the fence may be about to end
            if len(self.pieces) < self._num_done:
                self.pieces.append(Piece([]))
                continue
            text = line.expandtabs(4)
            shown = self.highlighter.preview(text) if is_partial else self.highlighter.add(text)
            self._add(fold_line(shown, width), margin, is_partial)
        if has_end or not is_open:
            self._add([line_of(closing, DIM)], margin, False)

    def _leaf_lines(self, node: SyntaxTreeNode, width: int) -> list[Line]:
        if node.type == "table":
            return table_lines(_table_cells(node), _table_aligns(node), width)
        if node.type == "hr":
            return [line_of("─" * min(width, RULE_WIDTH), DIM)]
        if node.type == "code_block":
            return [
                part
                for line in node.content.rstrip("\n").split("\n")
                for part in fold_line(line_of(line.expandtabs(4), CODE), width)
            ]
        style = HEADINGS.get(node.tag, OTHER_HEADING) if node.type == "heading" else PLAIN
        lines = split_lines(inline_segments(node.children, style))
        if self._task_length:
            lines[0], self._task_length = without_start(lines[0], self._task_length), 0
        return [part for line in lines for part in wrap_line(line, width)]

    def _is_done(self, node: SyntaxTreeNode) -> bool:
        """Return whether the last block cannot continue, whatever follows."""
        if not self._is_complete:
            return False
        if node.type in ("heading", "hr"):
            return True
        return node.type in ("paragraph", "table") and is_blank(self._source[-1])

    def _add(self, lines: Sequence[Line], margin: Margin, is_open: bool) -> None:
        """Add a piece, behind an empty line if one is due."""
        limit = self._width - min(MIN_WIDTH, self._width)
        gap = [] if self._gap is None else [_fit(self._gap, limit)]
        self._gap = None
        self.pieces.append(Piece([*gap, *([*_fit(margin.next(), limit), *line] for line in lines)], is_open))

    def _room(self, margin: Margin) -> int:
        return max(min(MIN_WIDTH, self._width), self._width - margin.width)

    def _is_after_blank(self, node: SyntaxTreeNode) -> bool:
        return start_line(node) > 0 and is_blank(self._source[start_line(node) - 1])


def is_blank(line: str) -> bool:
    """Return whether a line of the source is empty, inside a quote or not."""
    return not line.strip(" \t>")


def inline_segments(nodes: Sequence[SyntaxTreeNode], style: Style) -> Iterator[Segment]:
    """Yield inline Markdown as styled text. The address of a link stands behind its text."""
    for node in nodes:
        if node.type in ("softbreak", "hardbreak"):
            yield Segment("\n", style)
        elif node.type == "code_inline":
            yield Segment(_clean(node.content), style + CODE)
        elif node.type == "image":
            yield Segment(f"[image: {_clean(node.content)}]", style)
            yield from _address(node.attrs.get("src"), style)
        elif node.children:
            yield from inline_segments(node.children, style + INLINE_STYLES.get(node.type, PLAIN))
            if node.type == "link" and not _is_address(_text_of(node), url := str(node.attrs.get("href", ""))):
                yield from _address(url, style)
        else:
            yield Segment(_clean(node.content), style)


def _address(url: object, style: Style) -> Iterator[Segment]:
    if address := _clean(str(url or "")):
        yield Segment(f" ({address})", style + DIM)


def _is_address(text: str, url: str) -> bool:
    """Return whether the text of a link already says all of its address."""
    return text in (url, unquote(url)) or url in (f"mailto:{text}", f"http://{text}", f"https://{text}")


def _text_of(node: SyntaxTreeNode) -> str:
    return "".join(_text_of(child) for child in node.children) or ("" if node.type == "root" else node.content)


def _clean(text: str) -> str:
    """Return text of the parser without control characters, which entities and links may contain, and tabs."""
    return remove_controls(text).replace("\t", TAB)


def start_line(node: SyntaxTreeNode) -> int:
    """Return the first source line of a block."""
    return node.map[0] if node.map else 0


def is_closed(code: SyntaxTreeNode) -> bool:
    """Return whether the source has the last line of a block of code or formulas."""
    return code.map is None or code.map[1] - code.map[0] == code.content.count("\n") + 2


def _task_of(item: SyntaxTreeNode) -> str:
    """Return the box that an item of a task list begins with, such as `[x] `; empty without one."""
    paragraph = item.children[0] if item.children else None
    if paragraph is None or paragraph.type != "paragraph":
        return ""
    match = TASK.match(paragraph.children[0].content)
    return match[0] if match else ""


def _fit(prefix: Line, limit: int) -> Line:
    """Return the end of a prefix that is too wide."""
    return without_start(prefix, max(0, line_width(prefix) - limit))


def _table_cells(table: SyntaxTreeNode) -> list[list[list[Line]]]:
    """Return the lines of the cells of each row, the head first."""
    rows = [row for part in table.children for row in part.children]
    return [[split_lines(inline_segments(cell.children, PLAIN)) for cell in row.children] for row in rows]


def _table_aligns(table: SyntaxTreeNode) -> list[str]:
    """Return `left`, `right` or `center` for each column."""
    styles = [str(cell.attrs.get("style", "")) for cell in table.children[0].children[0].children]
    return [style.removeprefix("text-align:") or "left" for style in styles]
