"""How many answers may wait for the engine."""

from __future__ import annotations

import math
import time

from kimi_mlx.engine.engine import MAX_SEQUENCES
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.metrics import Metrics

MAX_RETRY_S = 60


class AdmissionQueue:
    """A line with an end.

    Args:
        places: answers that may wait, beside those that the engine could begin at once.
        metrics: where to count.
    """

    def __init__(self, places: int, metrics: Metrics):
        self._places = places
        self._metrics = metrics
        self.waiting = 0
        """Answers that wait now."""
        self._last_wait_s = 1.0

    def enter(self, count: int, running: int) -> QueueSlot:
        """Take places for so many answers.

        Args:
            count: of answers.
            running: answers that the engine has begun.

        Raises:
            ApiError: 400 if there will never be so many, 429 if there are not now.
        """
        most = self._places + MAX_SEQUENCES
        if count > most:
            message = f"{count} answers are asked for at once, the server takes at most {most}"
            raise ApiError(400, f"{message} ({MAX_SEQUENCES} run, its `--max-queue` wait)", "invalid_value", "n")
        if self.waiting + count > most - min(running, MAX_SEQUENCES):
            self._metrics.refused.inc(count)
            retry = min(max(math.ceil(self._last_wait_s), 1), MAX_RETRY_S)
            raise ApiError(
                429,
                f"{running} answers run and {self.waiting} are waiting already; try again later",
                "queue_full",
                retry_after_s=retry,
            )
        self.waiting += count
        return QueueSlot(self, count)

    def leave(self, count: int, since: float) -> None:
        """Free places that were taken at a time."""
        self._last_wait_s = time.monotonic() - since
        self.waiting -= count


class QueueSlot:
    """Places of one request in the line."""

    def __init__(self, line: AdmissionQueue, count: int):
        self._line, self._left = line, count
        self._since = time.monotonic()

    def begin(self) -> None:
        """One of its answers waits no longer."""
        if self._left:
            self._left -= 1
            self._line.leave(1, self._since)

    def close(self) -> None:
        """None of them does."""
        while self._left:
            self.begin()
