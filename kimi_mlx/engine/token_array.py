"""A growable array of token ids and keys of images, for comparisons and searches in long prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

COMPARISON_TOKENS = 4096
"""Number of tokens per comparison."""


class TokenArray:
    """A growable numpy array of token ids. Keys of images (ImageInput.key) stand for their placeholder tokens.

    Args:
        tokens: the first ids.
    """

    def __init__(self, tokens: Sequence[int]):
        self._buffer = np.array(tokens, np.int64)
        self._length = len(tokens)

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> Ids:
        """All ids."""
        return self._buffer[: self._length]

    def extend(self, tokens: Sequence[int]) -> None:
        """Append ids."""
        end = self._length + len(tokens)
        if end > self._buffer.size:
            self._buffer = np.concatenate([self.ids, np.empty(end, np.int64)])
        self._buffer[self._length : end] = tokens
        self._length = end

    def common_prefix(self, other: TokenArray, start: int = 0, limit: int | None = None) -> int:
        """Return the length of the common prefix with another array.

        Args:
            other: the other array.
            start: number of tokens that are known to be equal.
            limit: length at which to stop.
        """
        end = min(len(self), len(other)) if limit is None else min(len(self), len(other), limit)
        for begin in range(start, end, COMPARISON_TOKENS):
            stop = min(begin + COMPARISON_TOKENS, end)
            differs = self._buffer[begin:stop] != other._buffer[begin:stop]
            if differs.any():
                return begin + int(differs.argmax())
        return max(start, end)
