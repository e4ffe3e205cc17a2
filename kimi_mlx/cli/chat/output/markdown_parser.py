"""The Markdown of answers: CommonMark with tables and strikethrough, for text that is read while it is written.

What could change text far above it is left out: link definitions and headings that are underlined. HTML is text.
Formulas stay as they are written.
"""

from __future__ import annotations

import re

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.tree import SyntaxTreeNode

MATH_BLOCKS = {"$$": "$$", "\\[": "\\]"}
"""First and last line of a block of formulas."""
# limited, so that an opening without an end costs little
_MATH = re.compile(
    r"\$\$[^$]{1,2000}\$\$|\\\(.{1,2000}?\\\)|\\\[.{1,2000}?\\\]"
    r"|\$(?![\s$])(?:\\.|[^$\n\\`]){1,500}(?<!\s)\$(?!\d)",
    re.DOTALL,
)


def make_parser() -> MarkdownIt:
    """Return the parser."""
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.disable(["html_block", "html_inline", "lheading", "reference"])
    parser.block.ruler.before("fence", "math_block", _math_block, {"alt": ["paragraph", "blockquote", "list"]})
    parser.inline.ruler.before("escape", "math", _math)
    return parser


def parse(parser: MarkdownIt, text: str) -> list[SyntaxTreeNode]:
    """Return the blocks of a text."""
    return SyntaxTreeNode(parser.parse(text)).children


def close_markup(text: str) -> str:
    """Return unfinished Markdown with the markup of its last line closed, as it probably will be.

    The first lines of a table are left out until it is one.
    """
    if begun := _BEGUN_TABLE.search(text):
        return text[: begun.start()]
    head, newline, line = text.rpartition("\n")
    open_marks: list[str] = []
    for match in _MARKS.finditer(line):
        mark, is_code = match[0], bool(open_marks and open_marks[-1][0] == "`")
        if mark[0] == "\\":
            continue
        if mark in open_marks and (not is_code or open_marks[-1] == mark):
            del open_marks[open_marks.index(mark) :]
        elif not is_code and not line[match.end() :].startswith(" "):
            if match.end() == len(line) and mark[0] != "`":
                line = line[: match.start()]
                break
            open_marks.append(mark)
    if open_marks and open_marks[-1][0] == "`" and (line.endswith("`") or len(open_marks[-1]) > 2):
        open_marks.pop()  # an empty code span is none, and a fence is not closed on its line
    return head + newline + line.rstrip(" ") + "".join(reversed(open_marks)) if open_marks else head + newline + line


_BEGUN_TABLE = re.compile(r"(?:\A|(?<=\n\n))\|[^\n]*(?:\n\|?[-:| ]*)?\Z")
_MARKS = re.compile(r"\\.|`+|\*\*|~~|(?<![\s*])\*(?=\S)|(?<!\S)\*(?=\S)")


def _math(state: StateInline, silent: bool) -> bool:
    """Take a formula as text, without escapes and emphasis."""
    if state.src[state.pos] not in "$\\":
        return False
    match = _MATH.match(state.src, state.pos, state.posMax)
    if match is None:
        return False
    if not silent:
        state.push("text_special", "", 0).content = match[0]
        state.tokens[-1].info = "math"
    state.pos = match.end()
    return True


def _math_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """Take a block of formulas, from a line with `$$` or `\\[` to a line with `$$` or `\\]`, as it is."""
    opening = _line(state, start).strip()
    closing = MATH_BLOCKS.get(opening)
    if closing is None or state.is_code_block(start):
        return False
    if silent:
        return True
    last = start + 1
    while last < end and not (state.sCount[last] < state.blkIndent and not state.isEmpty(last)):
        if _line(state, last).strip() == closing:
            break
        last += 1
    is_closed = last < end and _line(state, last).strip() == closing
    state.line = last + is_closed
    token = state.push("math_block", "math", 0)
    token.content = state.getLines(start + 1, last, state.sCount[start], True)
    token.info, token.markup = opening, closing
    token.map = [start, state.line]
    return True


def _line(state: StateBlock, line: int) -> str:
    return state.src[state.bMarks[line] + state.tShift[line] : state.eMarks[line]]
