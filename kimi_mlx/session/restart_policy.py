"""Decide whether and when to restart a lost ring. Pure: it starts no processes and reads no clock."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.engine.events import Interrupted
from kimi_mlx.errors import RingError, SshError

RESTART_DELAYS_S = (1.0, 10.0, 30.0)
"""Delay before the first restart, the second, and all later ones."""

STABLE_S = 600.0
"""A ring that ran for longer than this gets the full number of restarts again."""

RESTARTABLE = (RingError, SshError)
"""Errors that a restart may fix. Any other error of a rank, such as a missing model, would only recur."""


@dataclass
class RestartPolicy:
    """Count the restarts of one ring.

    Args:
        max_restarts: maximum number of restarts without progress.
        num_attempts: number of restarts since the ring last made progress.
    """

    max_restarts: int
    num_attempts: int = 0

    def record_progress(self) -> None:
        """Reset the count: a token was generated.

        Loading alone is not progress: a request that always crashes a rank would then cause endless restarts.
        """
        self.num_attempts = 0

    def record_loss(self, uptime_s: float) -> None:
        """Reset the count if the ring ran for long enough before it was lost."""
        if uptime_s > STABLE_S:
            self.num_attempts = 0

    def next_attempt(self, reason: str) -> Interrupted | None:
        """Return the next restart as an event for callers; None if there are no restarts left.

        Args:
            reason: message of the error that ended the ring.
        """
        if self.num_attempts >= self.max_restarts:
            return None
        self.num_attempts += 1
        delay_s = RESTART_DELAYS_S[min(self.num_attempts, len(RESTART_DELAYS_S)) - 1]
        return Interrupted(reason, self.num_attempts, self.max_restarts, delay_s)
