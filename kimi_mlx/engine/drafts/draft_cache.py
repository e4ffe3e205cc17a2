"""The draft model's cache of one sequence, and captured states that the draft model has not read yet.

Row i was computed from the state of position i and token i + 1. Rows may be missing: those of blocks from the disk, and
the last one of a prefix. Missing rows make drafts worse; they never change the text.
"""

from __future__ import annotations

import bisect

import mlx.core as mx

from kimi_mlx.model.cache import LatentCache


class DraftCache:
    """Cached rows of one sequence, and its unread states.

    Attributes:
        rows: the cached rows.
        positions: position of each row, ascending.
    """

    def __init__(self) -> None:
        self.rows = LatentCache()
        self.positions: list[int] = []
        self._unread: list[tuple[int, mx.array]] = []
        """First position and states (1, L, width), ascending."""

    @property
    def num_unread(self) -> int:
        """Number of states that are not read yet."""
        return sum(states.shape[1] for _, states in self._unread)

    def add(self, position: int, states: mx.array) -> None:
        """Add captured states.

        Args:
            position: position of the first one.
            states: (1, L, width), L at least 1.
        """
        self._unread.append((position, states))

    def take(self, end: int) -> tuple[list[int], mx.array] | None:
        """Remove and return the positions and states before `end`, (1, L, width); None if there are none."""
        taken = [(start, states[:, : end - start]) for start, states in self._unread if start < end]
        self._unread = [
            (max(start, end), states[:, max(end - start, 0) :])
            for start, states in self._unread
            if start + states.shape[1] > end
        ]
        first = self.positions[-1] + 1 if self.positions else 0
        taken = [(max(start, first), states[:, max(first - start, 0) :]) for start, states in taken]
        taken = [(start, states) for start, states in taken if states.shape[1]]
        if not taken:
            return None
        positions = [start + index for start, states in taken for index in range(states.shape[1])]
        return positions, mx.concatenate([states for _, states in taken], axis=1)

    def truncate(self, num_tokens: int) -> None:
        """Keep only the rows and states of the first `num_tokens` tokens: row i depends on token i + 1."""
        count = bisect.bisect_left(self.positions, num_tokens - 1)
        self.rows.trim(len(self.positions) - count)
        del self.positions[count:]
        self._unread = [
            (start, states[:, : num_tokens - start]) for start, states in self._unread if start < num_tokens
        ]

    def copy(self, other: DraftCache, num_tokens: int) -> None:
        """Replace the contents with the rows and states of the first `num_tokens` tokens of another cache."""
        self.positions, self._unread = list(other.positions), list(other._unread)
        if other.positions:
            self.rows.copy(other.rows, len(other.positions))
        self.truncate(num_tokens)
