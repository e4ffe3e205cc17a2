"""Losses of the ring, once each in the log, however many answers they interrupt."""

from __future__ import annotations

import logging

from kimi_mlx.engine.request import Interrupted, Resumed
from kimi_mlx.errors import RingError

LOG = logging.getLogger(__name__)


class RingLog:
    """Writes a line when the ring is lost, one when it is back, and one when it is given up."""

    def __init__(self) -> None:
        self._last: Interrupted | RingError | None = None
        self._is_lost = False

    def lost(self, event: Interrupted) -> None:
        """An answer was told that the ring is lost."""
        if event is not self._last:  # all answers are given the same object
            self._last, self._is_lost = event, True
            LOG.warning("the ring is lost: %s (start %d of %d)", event.reason, event.attempt, event.attempts)

    def gone(self, error: RingError) -> None:
        """An answer was told that the ring is given up."""
        if error is not self._last:
            self._last = error
            LOG.error("the ring is given up: %s", error.message)

    def back(self, event: Resumed) -> None:
        """An answer was told that the ring stands again."""
        if self._is_lost:
            self._is_lost = False
            LOG.warning("the ring is back after %.1f s", event.seconds)
