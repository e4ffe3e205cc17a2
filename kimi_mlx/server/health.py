"""Health of the server."""

from __future__ import annotations

from kimi_mlx.server.service import Service
from kimi_mlx.session.session import SessionStatus

STALE_S = 120.0
"""Time without a finished step, while answers are running, after which the server reports itself as unavailable."""


def health_problem(service: Service, status: SessionStatus) -> str | None:
    """Return the reason why the server cannot answer now, or None if it can."""
    if service.is_closing:
        return "the server is shutting down"
    if not status.is_up:
        return status.reason or "the engine is not up"
    age = status.last_step_age_s
    if status.active and age is not None and age > STALE_S:
        return f"the last step ended {age:.0f} s ago"
    return None


def health_report(service: Service, status: SessionStatus) -> dict[str, object]:
    """Return the body of GET /health."""
    reason = health_problem(service, status)
    return {
        "status": "ok" if reason is None else "unavailable",
        "reason": reason,
        "running": status.active,
        "waiting": status.waiting,
        "last_step_age_s": status.last_step_age_s,
        "restarts": status.restarts,
    }
