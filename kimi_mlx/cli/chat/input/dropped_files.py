"""Paths of files in a typed line, in the forms in which terminals paste a dropped file.

The forms: with spaces as they are (Alacritty), escaped by backslashes (Terminal, iTerm2), in quotes (GNOME Terminal,
kitty, Windows Terminal), or as a `file://` URL (Konsole).
"""

from __future__ import annotations

import glob
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from kimi_mlx.cli.chat.files.media_files import is_media_file, to_path

# Only ASCII spaces separate words: the names of macOS' screenshots contain U+202F, a narrow no-break space.
_SPACE = " \t\r\n"
_QUOTED = re.compile(r"""(?=['"])(?:'[^'\n]*'|"(?:[^"\\\n]|\\.)*"|\\.)+(?=[ \t\r\n.,;:!?)]|$)""")
_WORD = re.compile(r"(?:\\.|[^ \t\r\n\\]|\\$)+")
_NEXT_WORD = re.compile(r"[ \t]+[^ \t\r\n]+")
_PUNCTUATION = ".,;:!?)"

MAX_SPACES = 16
"""Maximum number of unescaped spaces in a path: each costs a look at the disk."""

MAX_CANDIDATES = 256
"""Maximum number of possible paths in one line, so that a long pasted text costs no time."""


def split_dropped_files(text: str, is_wanted: Callable[[Path], bool]) -> list[str | Path]:
    """Split a line into its text and the files that were dropped into it.

    Only absolute paths, paths that begin with `~/`, and `file://` URLs count, at the beginning of a word.

    Args:
        text: typed line, or several lines.
        is_wanted: function that returns whether a path is a file to split off.

    Returns:
        Parts in the order of the line; text without spaces at its ends, and none that is empty.
    """
    parts: list[str | Path] = []
    start = position = 0
    tried = 0
    while (word := _next_word_start(text, position)) is not None and tried < MAX_CANDIDATES:
        position = word
        for path, end in _candidates(text, position):
            tried += 1
            if is_wanted(path):
                parts += [text[start:position], path]
                start = position = end
                break
        else:
            position = _word_end(text, position)
    parts.append(text[start:])
    stripped = [part.strip(_SPACE) if isinstance(part, str) else part for part in parts]
    return [part for part in stripped if part != ""]


def read_file_names(argument: str, is_wanted: Callable[[Path], bool] = is_media_file) -> list[Path]:
    """Return the files that the argument of a command names: one name as it is, or several names as a shell reads them.

    Patterns such as `*.png` mean the wanted files that they match. Spaces need no backslash if the file exists.

    Args:
        argument: text after the command, not empty.
        is_wanted: function that returns whether a pattern may mean a file.
    """
    literal = to_path(argument.strip(_SPACE))
    if os.path.lexists(literal):
        return [literal]
    names: list[Path] = []
    position = 0
    while (start := _next_word_start(argument, position)) is not None:
        candidates = list(_names(argument, start))
        existing = [candidate for candidate in candidates if os.path.lexists(candidate[0])]
        path, position = (existing or candidates)[0]
        matches = [] if existing else [Path(match) for match in sorted(glob.glob(str(path)))]
        names += [match for match in matches if is_wanted(match)] or [path]
    # the first name is not there: perhaps it has spaces, so report all of them
    return names if len(names) == 1 or os.path.lexists(names[0]) else [literal]


def last_word_start(argument: str) -> int:
    """Return where the last word of an argument begins; its end if a space comes last."""
    start = position = 0
    while (word := _next_word_start(argument, position)) is not None:
        start, position = word, _word_end(argument, word)
    return start if position == len(argument) else len(argument)


def unescape(word: str) -> str:
    """Return a word without its backslashes."""
    return re.sub(r"\\(.)", r"\1", word)


def quote_name(name: str) -> str:
    """Return a file name as a word that `read_file_names` reads."""
    return re.sub(r"""([ \t'"\\])""", r"\\\1", name)


def _names(text: str, start: int) -> Iterator[tuple[Path, int]]:
    """Yield possible (path, end) of a name at the beginning of a word: the word, then the word with those behind it."""
    quoted = _QUOTED.match(text, start)
    end = quoted.end() if quoted else _word_end(text, start)
    yield _unquote(text[start:end]), end
    if not quoted:
        yield from ((to_path(text[start:further]), further) for further in _further_ends(text, end))


def _candidates(text: str, start: int) -> Iterator[tuple[Path, int]]:
    """Yield possible (path, end) at the beginning of a word, the most likely one first."""
    if (quoted := _QUOTED.match(text, start)) is not None:
        yield from _absolute(quoted.group(), quoted.end())
        return
    end = _word_end(text, start)
    word = text[start:end]
    yield from _absolute(word, end)
    bare = word.rstrip(_PUNCTUATION)
    if bare != word:
        yield from _absolute(bare, start + len(bare))
    if not word.startswith(("/", "~/")):
        return
    for further in _further_ends(text, end):
        unescaped = text[start:further]
        for name in dict.fromkeys((unescaped, unescaped.rstrip(_PUNCTUATION))):
            yield to_path(name), start + len(name)


def _further_ends(text: str, end: int) -> Iterator[int]:
    """Yield the ends of the words that follow a position in the same line."""
    for _ in range(MAX_SPACES):
        following = _NEXT_WORD.match(text, end)
        if following is None:
            return
        end = following.end()
        yield end


def _absolute(word: str, end: int) -> Iterator[tuple[Path, int]]:
    """Yield the path of a word if it is absolute."""
    path = _unquote(word)
    if path.is_absolute():
        yield path, end


def _unquote(word: str) -> Path:
    """Return the path that a word means: a `file://` URL, a quoted or an escaped name."""
    if word[:7].lower() == "file://":
        return to_path(word)
    name = shlex.split(word)[0] if _QUOTED.fullmatch(word) else unescape(word)
    return to_path(name)


def _next_word_start(text: str, position: int) -> int | None:
    """Return the position of the next character that is no space; None at the end."""
    while position < len(text) and text[position] in _SPACE:
        position += 1
    return position if position < len(text) else None


def _word_end(text: str, start: int) -> int:
    match = _WORD.match(text, start)
    return start + 1 if match is None else match.end()
