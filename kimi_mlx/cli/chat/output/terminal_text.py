"""Text for a terminal: without characters that control it, and measured and wrapped in cells."""

from __future__ import annotations

import re
from itertools import pairwise

from wcwidth import iter_graphemes, wcstwidth

# CSI sequences (colours, cursor), then other escape sequences. Lengths are limited, so that an unfinished sequence
# never holds back much text.
_SEQUENCE = r"(?:\x1b\[|\x9b)[0-?]{0,32}[ -/]{0,4}[@-~]|\x1b[ -/]{0,4}[0-~]"
# Control characters but newline and tab, separators of lines, surrogates, and what shows nothing but changes the order
# of characters (bidirectional controls) or hides text (tags, fillers). Joiners of emoji and scripts and the variation
# selectors of emoji stay.
_CONTROLS = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
_REMOVED = re.compile(f"{_SEQUENCE}|[{_CONTROLS}]")
_CONTROL = re.compile(f"[{_CONTROLS}]")
_UNFINISHED = re.compile(r"(?:\x1b(?:\[[0-?]{0,32})?|\x9b[0-?]{0,32})[ -/]{0,4}\Z")

_NOT_FIRST = frozenset("!%),.:;?]}¢°·’”‰′″℃、。〃々〉》」』】〕〗〞︰﹐﹑﹒﹔﹕﹖﹗！％），．：；？］｝～ー")  # noqa: RUF001
"""Characters that may not begin a line of Chinese or Japanese text."""
_NOT_LAST = frozenset("([{£¥‘“〈《「『【〔〖〝（［｛￡￥")  # noqa: RUF001
"""Characters that may not end one."""
_WORDS = re.compile(r"[ \t]+|[^ \t]+")


class ControlFilter:
    """Removes control sequences from a stream of text; the result does not depend on where the text is cut."""

    def __init__(self) -> None:
        self._held = ""

    def add(self, text: str) -> str:
        """Return the text that can be shown; the start of an escape sequence is held back until its end arrives."""
        text = self._held + text
        unfinished = _UNFINISHED.search(text)
        self._held = unfinished.group() if unfinished else ""
        return _REMOVED.sub("", text[: len(text) - len(self._held)])


def remove_controls(text: str) -> str:
    """Return a text without characters that control a terminal, except newlines and tabs."""
    return _CONTROL.sub("", text)


def to_line(text: str) -> str:
    """Return a text as one line that cannot control a terminal: white space becomes single spaces."""
    return " ".join(_REMOVED.sub("", text).split())


def cell_width(text: str) -> int:
    """Return the number of cells of a text on this terminal, by TERM_PROGRAM or TERM; 0 for control characters."""
    return max(0, wcstwidth(text))


def shorten(text: str, width: int) -> str:
    """Return a line cut to a number of cells, with an ellipsis if something was cut."""
    if cell_width(text) <= width:
        return text
    kept, used = "", 0
    for grapheme in iter_graphemes(text):
        used += cell_width(grapheme)
        if used > width - 1:
            break
        kept += grapheme
    return kept.rstrip() + "…" if width > 0 else ""


def wrap_points(text: str, width: int) -> list[tuple[int, int]]:
    """Wrap one line of text.

    Lines break at spaces, which are dropped there, and around Chinese, Japanese and other wide characters, but not
    before closing and after opening punctuation. A word longer than the line breaks anywhere.

    Args:
        text: text without newlines and tabs.
        width: maximum number of cells of a line.

    Returns:
        (start, end) of each line in the text; at least one.
    """
    width = max(1, width)
    lines: list[tuple[int, int]] = []
    start = end = used = 0  # of the line in progress; `end` is behind its last word
    for match in _WORDS.finditer(text):
        if match[0].isspace():
            used += len(match[0])  # a space at the edge is dropped below
            continue
        for begin, stop, cells in _pieces(match[0], match.start()):
            if used + cells > width and end > start:
                lines.append((start, end))
                start, used = begin, 0
            if used + cells > width:  # longer than a line, or behind the indentation
                for cut in _cuts(text[begin:stop], width - used, width):
                    lines.append((start, begin + cut))
                    start = begin + cut
                used, cells = 0, cell_width(text[start:stop])
            used += cells
            end = stop
    lines.append((start, max(end, start)))
    return lines


def fold_points(text: str, width: int) -> list[tuple[int, int]]:
    """Break one line of text wherever it is full, and keep its spaces.

    Args:
        text: text without newlines and tabs.
        width: maximum number of cells of a line.

    Returns:
        (start, end) of each line in the text; at least one.
    """
    width = max(1, width)
    edges = [0, *_cuts(text, width, width), len(text)]
    return list(pairwise(edges))


def _pieces(word: str, offset: int) -> list[tuple[int, int, int]]:
    """Return (start, end, cells) of the parts of a word between which a line may break."""
    if word.isascii():
        return [(offset, offset + len(word), len(word))]
    pieces: list[tuple[int, int, int]] = []
    was_wide, before = False, ""
    for grapheme in iter_graphemes(word):
        cells = cell_width(grapheme)
        is_wide = cells > 1
        breaks = (is_wide or was_wide) and grapheme[0] not in _NOT_FIRST and before not in _NOT_LAST
        stop = offset + len(grapheme)
        if pieces and not breaks:
            start, _, total = pieces[-1]
            pieces[-1] = (start, stop, total + cells)
        else:
            pieces.append((offset, stop, cells))
        offset, was_wide, before = stop, is_wide, grapheme[-1]
    return pieces


def _cuts(word: str, first: int, width: int) -> list[int]:
    """Return the offsets at which a word is cut to lines, the first of another width; none where it fits."""
    if word.isascii():
        return list(range(max(0, first), len(word), width))
    cuts: list[int] = []
    room, used, offset = first, 0, 0
    for grapheme in iter_graphemes(word):
        cells = cell_width(grapheme)
        if used + cells > room and (offset > (cuts[-1] if cuts else 0) or room < width):
            cuts.append(offset)
            room, used = width, 0
        used += cells
        offset += len(grapheme)
    return cuts
