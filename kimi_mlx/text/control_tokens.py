"""Keeping control tokens apart from text that merely looks like them.

A chat template writes both into one string. Before rendering, an escape character that occurs nowhere in the
input goes into every place where text from outside spells a control token or could become part of one; after
rendering, a control token's text without the escape can only be the template's own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from kimi_mlx.errors import TextError

# Noncharacters first: no text should have them. Then private use, for input that was made to exhaust them.
ESCAPES = tuple(map(chr, itertools.chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))))


class ControlTokens:
    """The texts of a tokenizer's control tokens."""

    def __init__(self, special_tokens: Mapping[str, int]):
        self._ids = dict(special_tokens)
        # Longest first, so that no token hides behind one that it begins with.
        names = sorted((name for name in self._ids if name), key=len, reverse=True)
        nothing = r"(?!)"
        self._find = re.compile("|".join(map(re.escape, names)) or nothing)
        self._beginnings = {name[:length] for name in names for length in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def split(self, text: str) -> list[str | int]:
        """Return the text between the control tokens, and their ids in their places."""
        parts: list[str | int] = []
        at = 0
        for match in self._find.finditer(text):
            parts += [text[at : match.start()], self._ids[match.group()]]
            at = match.end()
        parts.append(text[at:])
        return [part for part in parts if part != ""]

    def guard(self, value: Any, escape: str) -> Any:
        """Return `value` with every string in it made harmless, keys too; other leaves stay as they are."""
        if isinstance(value, str):
            return self._guard_text(value, escape)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {self.guard(key, escape): self.guard(item, escape) for key, item in items}
        if isinstance(value, list | tuple):
            return [self.guard(item, escape) for item in cast("Sequence[Any]", value)]
        return value

    def _guard_text(self, text: str, escape: str) -> str:
        parts: list[str] = []
        at = 0
        # From one character after each find, since control tokens may overlap.
        while match := self._find.search(text, at):
            parts.append(text[at : match.start() + 1])
            at = match.start() + 1
        text = escape.join([*parts, text[at:]])
        # What is only the beginning of a control token could go on in the next string.
        ends = (text[-length:] for length in range(1, min(len(text), self._longest) + 1))
        return text + escape if any(end in self._beginnings for end in ends) else text


def choose_escape(inputs: Iterable[str]) -> str:
    """Return a character that occurs in none of the inputs, nor does its JSON escape.

    Raises:
        TextError: there is none.
    """
    text = "\n".join(inputs)
    for escape in ESCAPES:
        if escape not in text and json_escape(escape) not in text:
            return escape
    raise TextError("the messages hold every private-use character there is", hint="shorten the messages")


def json_escape(char: str) -> str:
    """Return how JSON restricted to ASCII writes a character."""
    code = char.encode("utf-16-be")
    return "".join(f"\\u{code[i : i + 2].hex()}" for i in range(0, len(code), 2))


def strings_in(value: Any) -> Iterable[str]:
    """Yield every string in nested lists and objects, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from strings_in(item)
