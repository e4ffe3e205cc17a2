"""How a session is getting on, for whoever watches it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SessionStatus:
    """A session's state.

    Args:
        is_up: whether requests are being answered, or would be.
        reason: why not.
        active: requests in the engine's batch.
        waiting: requests that it has not begun.
        last_step_age_s: how long ago a step ended; None if none has yet.
        restarts: how often the ring was started again.
        cached_tokens: in the caches of all conversations, as the last answer left them.
    """

    is_up: bool
    reason: str | None = None
    active: int = 0
    waiting: int = 0
    last_step_age_s: float | None = None
    restarts: int = 0
    cached_tokens: int = 0
