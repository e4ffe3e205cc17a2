"""Choose how many pieces of experts are read at the same time, from the rates of the reads while a model is loaded."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

DEPTHS: Sequence[int] = (4, 8, 16)
"""Numbers of pieces at the same time that are tried."""

DEFAULT_DEPTH = 8
"""Number of pieces at the same time if there are not enough reads to choose."""

ROUNDS = 2
"""Number of windows of each depth; the faster one counts."""

WINDOW_S, WINDOW_PIECES = 0.2, 32
"""A window ends after this time and this number of pieces."""

MIN_GAIN = 1.05
"""Ratio of rates from which on a larger depth is better. More reads at the same time make a single one slower."""


class DepthTrial:
    """Rates of reads at several depths, which take turns in windows. Not thread-safe.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._windows = deque(depth for _ in range(ROUNDS) for depth in DEPTHS)
        self._rates = dict.fromkeys(DEPTHS, 0.0)
        self._num_left = 0
        self.restart_window()

    @property
    def depth(self) -> int:
        """Number of pieces to read at the same time now."""
        return self._windows[0] if self._windows else self.best

    @property
    def best(self) -> int:
        """The smallest depth that is about as fast as the fastest one; DEFAULT_DEPTH while windows are missing."""
        if self._windows:
            return DEFAULT_DEPTH
        fastest = max(self._rates.values())
        return min(depth for depth, rate in self._rates.items() if rate * MIN_GAIN >= fastest)

    def restart_window(self) -> None:
        """Drop the current window: the queue of reads was empty, or the depth has changed.

        The pieces that are read now do not count: they began before.
        """
        self._num_left = max(DEPTHS)
        self._begun_s, self._num_pieces, self._num_bytes = 0.0, 0, 0

    def add(self, num_bytes: int) -> None:
        """Count a piece whose read has ended."""
        if not self._windows:
            return
        now = self._clock()
        if self._num_left:
            self._num_left -= 1
            self._begun_s = now
            return
        self._num_pieces += 1
        self._num_bytes += num_bytes
        seconds = now - self._begun_s
        if seconds >= WINDOW_S and self._num_pieces >= WINDOW_PIECES:
            depth = self._windows.popleft()
            self._rates[depth] = max(self._rates[depth], self._num_bytes / seconds)
            self.restart_window()
