"""Allowed tokens in the id of a tool call, `functions.NAME:INDEX` of an offered tool."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence

MAX_CACHED = 4096
"""Maximum number of cached results per set of tools."""


class CallIdTokens:
    """The allowed tokens in the ids of calls of one set of tools.

    Args:
        names: ids without their index: `functions.NAME`.
        token_ids: ids of the tokens of text, by their bytes.
    """

    def __init__(self, names: Iterable[str], token_ids: Mapping[bytes, Sequence[int]]):
        self._names = sorted({name.encode(errors="replace") + b":" for name in names})
        self._token_ids = token_ids
        self._max_bytes = max(map(len, token_ids), default=0)
        self._cache: dict[tuple[bytes, int], tuple[int, ...]] = {}

    def next_tokens(self, text: bytes, index: int) -> tuple[int, ...]:
        """Return the tokens that continue an id; empty if it is complete, or if no id begins with the text.

        Args:
            text: the id so far.
            index: index of the call.
        """
        key = (text, index)
        if key not in self._cache:
            if len(self._cache) == MAX_CACHED:
                self._cache.clear()
            self._cache[key] = tuple(self._find(text, index))
        return self._cache[key]

    def is_beginning(self, text: bytes, index: int) -> bool:
        """Return whether an id with this index begins with the text."""
        return next(self._remainders(text, index), None) is not None

    def is_complete(self, text: bytes, index: int) -> bool:
        """Return whether the text is an id with this index."""
        return b"" in self._remainders(text, index)

    def _remainders(self, text: bytes, index: int) -> Iterator[bytes]:
        """Yield, for each id that begins with the text, the bytes after it."""
        digits = str(index).encode()
        # names that begin with the text are next to each other
        for name in self._names[bisect_left(self._names, text) : bisect_left(self._names, text + b"\xff")]:
            yield (name + digits)[len(text) :]
        written = text[: text.rfind(b":") + 1]
        at = bisect_left(self._names, written)
        if written != text and self._names[at : at + 1] == [written] and (written + digits).startswith(text):
            yield (written + digits)[len(text) :]

    def _find(self, text: bytes, index: int) -> set[int]:
        """Compute the tokens that continue an id."""
        beginnings = {
            rest[:length]
            for rest in self._remainders(text, index)
            for length in range(1, min(len(rest), self._max_bytes) + 1)
        }
        return {token for beginning in beginnings for token in self._token_ids.get(beginning, ())}
