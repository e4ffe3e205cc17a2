"""Formulas in Markdown: `$...$` and `\\(...\\)` in a line, `$$...$$` and `\\[...\\]` on lines of their own.

Without these rules, Markdown would interpret the backslashes, underscores and asterisks of TeX.
"""

from __future__ import annotations

from markdown_it import MarkdownIt
from markdown_it.common.utils import escapeHtml
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from kimi_mlx.server.page.mathml import MAX_CHARS, UnknownTexError, to_mathml

CLOSING = {"$$": "$$", "\\[": "\\]", "\\(": "\\)", "$": "$"}
"""Closing delimiter of a formula, by its opening one; longer ones first."""

MAX_LINES = 100
"""Maximum number of lines of a formula."""

DISPLAYED = ("$$", "\\[")


def add_formulas(parser: MarkdownIt) -> None:
    """Add rules for formulas to a parser; they become tokens of the types `formula` and `formula_block`."""
    parser.inline.ruler.before("escape", "formula", _find_in_line)
    parser.block.ruler.before(
        "fence", "formula_block", _find_block, {"alt": ["paragraph", "reference", "blockquote", "list"]}
    )


def formula_html(token: Token) -> str:
    """Return the HTML of a formula: MathML, or its TeX if that is not supported."""
    is_display = token.markup in DISPLAYED
    tag = "div" if token.type == "formula_block" else "span"
    try:
        if token.meta.get("is_open"):
            raise UnknownTexError("unfinished")
        html = to_mathml(token.content, is_display=is_display)
    except UnknownTexError:
        closing = "" if token.meta.get("is_open") else CLOSING[token.markup]
        html = f"<code>{escapeHtml(token.markup + token.content + closing)}</code>"
    return f'<{tag} class="formula" tabindex="0">{html}</{tag}>' if is_display else html


def _find_in_line(state: StateInline, silent: bool) -> bool:
    opening = next((mark for mark in CLOSING if state.src.startswith(mark, state.pos)), None)
    if opening is None:
        return False
    begin = state.pos + len(opening)
    end = state.src.find(CLOSING[opening], begin, min(state.posMax, begin + MAX_CHARS))
    if end < 0 or not state.src[begin:end].strip():
        return False
    after = end + len(CLOSING[opening])
    if opening == "$" and not _is_formula(state.src, state.pos, end):
        return False
    if not silent:
        token = state.push("formula", "math", 0)
        token.markup, token.content = opening, state.src[begin:end]
    state.pos = after
    return True


def _is_formula(text: str, begin: int, end: int) -> bool:
    """Return whether two dollar signs enclose a formula, and not amounts of money as in `$5 and $10`."""
    before, after = text[begin - 1 : begin], text[end + 1 : end + 2]
    inside = text[begin + 1 : end]
    return not (
        before.isalnum()
        or after.isalnum()
        or after == "$"
        or inside[0].isspace()
        or inside[-1].isspace()
        or inside[-1] == "\\"
    )


def _find_block(state: StateBlock, first: int, last: int, silent: bool) -> bool:
    if state.is_code_block(first):
        return False
    line = _line(state, first)
    opening = line[:2]
    if opening not in DISPLAYED:
        return False
    closing = CLOSING[opening]
    if not _may_end(state.src, state.bMarks[first] + state.tShift[first] + 2, closing):
        return False
    lines = [line[2:]]
    number = first
    while closing not in lines[-1]:
        number += 1
        if number >= last:  # an unfinished block: the rest may still come
            break
        if state.isEmpty(number) or state.sCount[number] < state.blkIndent:
            return False
        lines.append(_line(state, number))
    content, found, rest = "\n".join(lines).partition(closing)
    if not content.strip() or rest.strip(" .,;"):
        return False
    if silent:
        return True
    state.line = min(number + 1, last)
    token = state.push("formula_block", "math", 0)
    token.markup, token.content, token.block = opening, content.rstrip() if found else content, True
    token.map = [first, state.line]
    token.meta["is_open"] = not found
    return True


def _may_end(text: str, begin: int, closing: str) -> bool:
    """Return whether a formula that begins here can be short enough: a quick check, as many lines may look like one."""
    limit = begin + MAX_CHARS
    end = text.find(closing, begin, limit)
    return text.count("\n", begin, limit if end < 0 else end) <= MAX_LINES and (end >= 0 or limit >= len(text))


def _line(state: StateBlock, number: int) -> str:
    return state.src[state.bMarks[number] + state.tShift[number] : state.eMarks[number]].rstrip()
