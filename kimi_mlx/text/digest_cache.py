"""A cache for functions of long texts that keeps digests instead of the texts."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class DigestCache(Generic[Value]):
    """Results of a function of a text, by the digest of the text; the least recently used ones are dropped.

    Args:
        compute: the function. Two threads may compute the same result at the same time.
        max_entries: maximum number of results.
    """

    def __init__(self, compute: Callable[[str], Value], max_entries: int):
        self._compute, self._max_entries = compute, max_entries
        self._entries: OrderedDict[bytes, Value] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, text: str) -> Value:
        """Return the result for a text."""
        key = digest(text)
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        value = self._compute(text)
        with self._lock:
            self._entries[key] = value
            if len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        return value

    def __contains__(self, text: str) -> bool:
        """Return whether the result for a text is cached."""
        with self._lock:
            return digest(text) in self._entries


def digest(text: str) -> bytes:
    """Return a hash of a text, 16 bytes."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).digest()
