r"""Files that a message mentions as `@path`.

`@` counts at the beginning of a word only, so mail addresses never do. A name with spaces is written in quotes or with
backslashes: `@"two words.txt"`, `@two\ words.txt`. `\@path` is the text `@path`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kimi_mlx.cli.chat.files.media_files import media_kind, to_path
from kimi_mlx.cli.chat.input.dropped_files import unescape
from kimi_mlx.cli.chat.input.user_input import UserInput

MAX_MENTIONS = 256
"""Maximum number of words with `@` that are looked up on the disk."""

_MENTION = re.compile(r"""(?:^|(?<=[\s(\[{<"'`,;:]))(\\?)@("[^"\n]+"|'[^'\n]+'|(?:\\.|[^\s\\])+)""")
_TYPED = re.compile(r"""(?:^|[\s(\[{<"'`,;:])@((?:\\.|[^\s\\])*)\Z""")
_PUNCTUATION = """.,;:!?)]}>"'`"""
_PATH = re.compile(r"[\w.~+\-/ ]+")
_SUFFIX = re.compile(
    r"\.(c|cc|cfg|conf|cpp|cs|css|csv|diff|env|go|h|hpp|html|ini|ipynb|java|js|json|jsonl|jsx|kt|log|lua|m|md|mjs|"
    r"mm|patch|php|pl|py|pyi|r|rb|rs|rst|scala|sh|sql|svg|swift|tex|toml|ts|tsv|tsx|txt|vue|xml|yaml|yml|zig)"
)
"""Suffixes of names that mean a file even if there is none."""


@dataclass(frozen=True)
class Mention:
    r"""A word of a message that mentions a file.

    Attributes:
        start: position of `@`, or of the backslash before it.
        end: position behind the path.
        path: the path; it exists if `exists`.
        exists: whether there is something at the path.
        is_escaped: whether the word means text: `\@path`.
    """

    start: int
    end: int
    path: Path
    exists: bool
    is_escaped: bool = False


def find_mentions(message: UserInput) -> list[Mention]:
    """Return the words of a message that begin with `@` and name something that exists, or that look like a path."""
    mentions: list[Mention] = []
    for number, found in enumerate(_MENTION.finditer(message.text)):
        if number == MAX_MENTIONS:
            break
        if message.is_pasted(found.start()):
            continue
        is_escaped = bool(found[1])
        path, end = _existing(found) or (None, found.end())
        if path is not None:
            mentions.append(Mention(found.start(), end, path, True, is_escaped))
        elif not is_escaped and _is_path_like(word := found[2].rstrip(_PUNCTUATION)):
            mentions.append(Mention(found.start(), found.start(2) + len(word), to_path(unescape(word)), False))
    return mentions


def mention_start(typed: str) -> int | None:
    """Return where the path of a mention begins that is being typed at the end of a text; None if there is none."""
    found = _TYPED.search(typed)
    return None if found is None else found.start(1)


def _existing(found: re.Match[str]) -> tuple[Path, int] | None:
    """Return the path that exists, and its end: the word, without punctuation behind it if there is no such path."""
    return next(((path, end) for path, end in _candidates(found) if os.path.lexists(path)), None)


def _candidates(found: re.Match[str]) -> Iterator[tuple[Path, int]]:
    word = found[2]
    if word[0] in "\"'" and word[-1] == word[0] and len(word) > 2:
        yield to_path(word[1:-1]), found.end()
        return
    while any(character.isalnum() for character in word):  # not `@.`
        yield to_path(unescape(word)), found.start(2) + len(word)
        if word[-1] not in _PUNCTUATION:
            return
        word = word[:-1]


def _is_path_like(word: str) -> bool:
    """Return whether a word is certainly meant as a path; `@types/node` and `@app.route` may be names in code."""
    if not _PATH.fullmatch(word) or not any(character.isalnum() for character in word):
        return False
    path = Path(word)
    is_file_name = _SUFFIX.fullmatch(path.suffix.lower()) is not None or media_kind(path) is not None
    return is_file_name or word.startswith(("/", "~/", "./", "../")) or ("/" in word and os.path.isdir(path.parent))
