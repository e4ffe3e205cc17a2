"""Decisions about restarts of a lost ring."""

from __future__ import annotations

from kimi_mlx.engine.events import Interrupted
from kimi_mlx.session.restart_policy import STABLE_S, RestartPolicy


def test_delays_grow_until_no_restarts_are_left() -> None:
    policy = RestartPolicy(max_restarts=4)
    attempts = [policy.next_attempt("lost") for _ in range(4)]
    assert attempts == [Interrupted("lost", i, 4, delay_s) for i, delay_s in ((1, 1), (2, 10), (3, 30), (4, 30))]
    assert policy.next_attempt("lost") is None


def test_with_a_limit_of_zero_there_is_no_restart() -> None:
    assert RestartPolicy(max_restarts=0).next_attempt("lost") is None


def test_progress_and_a_long_uptime_reset_the_count() -> None:
    policy = RestartPolicy(max_restarts=1)
    for _ in range(3):
        assert policy.next_attempt("lost") is not None
        policy.record_progress()
    policy.next_attempt("lost")
    policy.record_loss(uptime_s=STABLE_S)
    assert policy.next_attempt("lost") is None
    policy.record_loss(uptime_s=STABLE_S + 1)
    assert policy.next_attempt("lost") == Interrupted("lost", 1, 1, 1.0)
