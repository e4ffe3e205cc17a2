"""Find the tokens that end JSON soonest, among those that a grammar allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BACKSLASH, QUOTE = 0x5C, 0x22

OUTSIDE_STRINGS = (
    *((b"}",), (b"]",), (b":",), (b'"',), tuple(b"%d" % digit for digit in range(10)), (b",",)),
    *((b"null", b"true", b"false"), (b"n", b"t", b"f"), (b"-", b"."), (b"[",), (b"{",)),
)
"""Groups of tokens outside of strings, the best ones first."""


@dataclass(frozen=True)
class JsonPlace:
    """A position in JSON text: inside or outside of a string.

    Args:
        in_string: whether it is inside of a string.
        is_escaped: whether a backslash precedes it there.
    """

    in_string: bool = False
    is_escaped: bool = False

    def after(self, text: bytes) -> JsonPlace:
        """Return the position after more text."""
        in_string, is_escaped = self.in_string, self.is_escaped
        for byte in text:
            if is_escaped:
                is_escaped = False
            elif byte == QUOTE:
                in_string = not in_string
            else:
                is_escaped = in_string and byte == BACKSLASH
        return JsonPlace(in_string, is_escaped)


BEGINNING = JsonPlace()


class JsonClosing:
    """Finds the tokens that end JSON soonest.

    Args:
        token_ids: ids of the tokens of text, by their bytes.
    """

    def __init__(self, token_ids: Mapping[bytes, Sequence[int]]):
        self._groups = [[id for text in group for id in token_ids.get(text, ())] for group in OUTSIDE_STRINGS]
        self._quotes = [[*token_ids.get(b'"', ())]]

    def groups(self, place: JsonPlace) -> Sequence[Sequence[int]]:
        """Return groups of tokens, the best ones first; a group whose tokens are all forbidden does not count."""
        return self._quotes if place.in_string else self._groups
