"""Distinguish control tokens from text that only looks like them.

A chat template writes both into one string. Before rendering, an escape character that does not occur in the input is
inserted at every place where user text spells a control token or could become part of one. After rendering, the text
of a control token without the escape can only come from the template.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from kimi_mlx.errors import TextError

# Noncharacters first: no text should contain them. Then private use, for input that contains all of those.
ESCAPES = tuple(map(chr, itertools.chain(range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))))


class ControlTokens:
    """The control tokens of a tokenizer.

    Args:
        special_tokens: id of each token, by its text.
    """

    def __init__(self, special_tokens: Mapping[str, int]):
        self._ids = dict(special_tokens)
        # Longest first: a token may be the beginning of another.
        names = sorted((name for name in self._ids if name), key=len, reverse=True)
        nothing = r"(?!)"
        self._find = re.compile("|".join(map(re.escape, names)) or nothing)
        self._beginnings = {name[:length] for name in names for length in range(1, len(name))}
        self._longest = max(map(len, names), default=0)

    def split(self, text: str) -> list[str | int]:
        """Split text at control tokens; return strings of plain text and ids of control tokens, in order."""
        parts: list[str | int] = []
        at = 0
        for match in self._find.finditer(text):
            parts += [text[at : match.start()], self._ids[match.group()]]
            at = match.end()
        parts.append(text[at:])
        return [part for part in parts if part != ""]

    def escape_in(self, value: Any, escape: str) -> Any:
        """Return `value` with the control tokens escaped in all its strings, keys included."""
        if isinstance(value, str):
            return self._escape_text(value, escape)
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            return {self.escape_in(key, escape): self.escape_in(item, escape) for key, item in items}
        if isinstance(value, list | tuple):
            return [self.escape_in(item, escape) for item in cast("Sequence[Any]", value)]
        return value

    def _escape_text(self, text: str, escape: str) -> str:
        parts: list[str] = []
        at = 0
        # Continue one character after each match, because control tokens may overlap.
        while match := self._find.search(text, at):
            parts.append(text[at : match.start() + 1])
            at = match.start() + 1
        text = escape.join([*parts, text[at:]])
        # The beginning of a control token at the end of this string could be completed by the next string.
        ends = (text[-length:] for length in range(1, min(len(text), self._longest) + 1))
        return text + escape if any(end in self._beginnings for end in ends) else text


def choose_escape(inputs: Iterable[str]) -> str:
    """Return a character that does not occur in the inputs, neither as itself nor as a JSON escape.

    Raises:
        TextError: all candidates occur.
    """
    text = "\n".join(inputs)
    for escape in ESCAPES:
        if escape not in text and json_escape(escape) not in text:
            return escape
    raise TextError("the messages contain every private-use character", hint="shorten the messages")


def json_escape(char: str) -> str:
    """Return the escape of a character in ASCII JSON."""
    code = char.encode("utf-16-be")
    return "".join(f"\\u{code[i : i + 2].hex()}" for i in range(0, len(code), 2))


def strings_in(value: Any) -> Iterable[str]:
    """Yield every string in nested lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in cast("Mapping[Any, Any]", value).items():
            yield from strings_in(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in cast("Sequence[Any]", value):
            yield from strings_in(item)
