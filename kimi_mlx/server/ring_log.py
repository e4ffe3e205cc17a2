"""Log of the losses of the ring."""

from __future__ import annotations

import logging

from kimi_mlx.engine.events import Interrupted, Resumed
from kimi_mlx.errors import RingError

LOG = logging.getLogger(__name__)


class RingLog:
    """Logs each loss of the ring only once, even if it interrupts several answers."""

    def __init__(self) -> None:
        self._last: Interrupted | RingError | None = None
        self._is_lost = False

    def on_interrupted(self, event: Interrupted) -> None:
        """Log that the ring was lost."""
        if event is not self._last:  # all answers receive the same object
            self._last, self._is_lost = event, True
            LOG.warning("lost the ring: %s (restart %d of %d)", event.reason, event.attempt, event.attempts)

    def on_failed(self, error: RingError) -> None:
        """Log that the ring will not be restarted again."""
        if error is not self._last:
            self._last = error
            LOG.error("the ring failed for good: %s", error.message)

    def on_resumed(self, event: Resumed) -> None:
        """Log that the ring is up again."""
        if self._is_lost:
            self._is_lost = False
            LOG.warning("the ring is up again after %.1f s", event.seconds)
