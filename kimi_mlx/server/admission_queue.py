"""Admission of requests: a bounded queue in front of the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from contextlib import contextmanager

from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.metrics import Metrics

MAX_RETRY_S = 60
"""Upper limit of Retry-After."""


class AdmissionQueue:
    """Limits the number of answers that the engine has not started.

    Args:
        capacity: maximum number of answers that wait.
        metrics: metrics of the server.
    """

    def __init__(self, capacity: int, metrics: Metrics):
        self._capacity = capacity
        self._metrics = metrics
        self.waiting = 0
        """Number of answers that are waiting now."""
        self._last_wait_s = 1.0

    def enter(self, count: int, running: int) -> QueueSlots:
        """Reserve slots for the answers of one request.

        Args:
            count: number of answers.
            running: number of answers that the engine has started.

        Raises:
            ApiError: 400 if the request exceeds the queue, 429 if the queue is full now.
        """
        if count > self._capacity:
            message = f"the request has {count} answers, but at most {self._capacity} can wait at the same time"
            raise ApiError(400, message, "invalid_value", "n", hint=f"--max-queue is {self._capacity}")
        self._check_free(count, running)
        self.waiting += count
        return QueueSlots(self, count)

    @contextmanager
    def hold_slot(self, running: int) -> Generator[None]:
        """Hold one slot while a request is being prepared.

        Args:
            running: number of answers that the engine has started.

        Raises:
            ApiError: 429, the queue is full.
        """
        self._check_free(1, running)
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def leave(self, count: int, entered_at: float) -> None:
        """Release slots that were reserved at `entered_at`; their waiting time becomes the next Retry-After."""
        self._last_wait_s = time.monotonic() - entered_at
        self.waiting -= count

    def _check_free(self, count: int, running: int) -> None:
        if self.waiting + count > self._capacity:
            self._metrics.refused.inc(count)
            retry_after_s = min(max(math.ceil(self._last_wait_s), 1), MAX_RETRY_S)
            raise ApiError(
                429,
                f"the queue is full: {running} answers are running and {self.waiting} are waiting; retry later",
                "queue_full",
                retry_after_s=retry_after_s,
                hint=f"--max-queue is {self._capacity}",
            )


class QueueSlots:
    """Slots in the queue for the answers of one request."""

    def __init__(self, queue: AdmissionQueue, count: int):
        self._queue, self._remaining = queue, count
        self._entered_at = time.monotonic()

    def start_one(self) -> None:
        """Release the slot of one answer: the engine has started it."""
        if self._remaining:
            self._remaining -= 1
            self._queue.leave(1, self._entered_at)

    def close(self) -> None:
        """Release all remaining slots."""
        while self._remaining:
            self.start_one()
