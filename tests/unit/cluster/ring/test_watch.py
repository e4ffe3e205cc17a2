"""RingWatch finds silent ranks, dead links and stalled steps in time, and raises no false alarms."""

from __future__ import annotations

from typing import Any

from kimi_mlx.cluster.ring.watch import RingProblem, RingTimeouts, RingWatch

TIMEOUTS = RingTimeouts(silence_s=10, step_s=10, stall_s=300)


def heartbeat(work: str = "idle", step: int = 0, **links: float) -> dict[str, Any]:
    return {"kind": "alive", "work": work, "step": step, "links": {name[1:]: age for name, age in links.items()}}


def run(seconds: float, *heartbeats: Any, start: float = 0) -> tuple[RingProblem | None, float]:
    """Send each rank's heartbeat of every second to the watch; return the first problem and its time."""
    watch = RingWatch(2, TIMEOUTS, start)
    now = start
    while now < start + seconds:
        for rank, heartbeat_at in enumerate(heartbeats):
            if (message := heartbeat_at(now)) is not None:
                watch.on_message(rank, message, now)
        for quarter in range(4):
            if (problem := watch.check(now + quarter / 4)) is not None:
                return problem, now + quarter / 4
        now += 1
    return None, now


def test_idle_ranks_are_no_problem() -> None:
    assert run(20_000, lambda now: heartbeat(), lambda now: heartbeat())[0] is None


def test_silent_rank_is_found_in_time() -> None:
    problem, at = run(100, lambda now: heartbeat(), lambda now: heartbeat() if now < 20 else None)
    assert problem == RingProblem("has not responded for 10 s (limit 10 s)", 1)
    assert 19 + 10 <= at < 20 + 10.5


def test_long_load_or_prefill_is_a_stall_only_without_progress() -> None:
    for work in ("load", "prefill"):
        problem, _ = run(5000, *[lambda now, work=work: heartbeat(work, int(now) // 290)] * 2)
        assert problem is None
        problem, at = run(5000, *[lambda now, work=work: heartbeat(work, 1)] * 2)
        assert problem is not None
        assert problem.is_stall
        assert f"no progress in {work} for 300 s" in problem.message
        assert at < 302


def test_stalled_decode_is_found_soon() -> None:
    problem, at = run(100, *[lambda now: heartbeat("decode", int(min(now, 30)))] * 2)
    assert problem == RingProblem("no progress in decode for 10 s, though all ranks are alive", is_stall=True)
    assert 40 <= at < 41
    # a rank that is still in prefill has more time
    assert run(100, lambda now: heartbeat("decode", 1), lambda now: heartbeat("prefill", 1))[0] is None


def test_dead_link_is_distinguished_from_a_dead_rank() -> None:
    def link_alive_until(end: float, peer: int) -> Any:
        return lambda now: heartbeat("prefill", 1, **{f"r{peer}": max(now - end, 0.2)})

    problem, at = run(100, link_alive_until(50, 1), link_alive_until(50, 0))
    assert problem is not None
    assert (problem.rank, problem.is_stall) == (0, True)
    assert "has received nothing from rank 1 for 10 s" in problem.message
    assert 60 <= at < 61
    rank_1 = link_alive_until(50, 0)
    problem, _ = run(100, link_alive_until(50, 1), lambda now: rank_1(now) if now < 50 else None)
    assert problem is not None
    assert (problem.rank, problem.message[:17]) == (1, "has not responded")


def test_stopped_rank_is_not_reported_as_a_dead_link() -> None:
    problem, at = run(
        100,
        lambda now: heartbeat("prefill", 1, r1=max(now - 50, 0.2)),
        lambda now: heartbeat("prefill", 1, r0=0.9) if now < 50 else None,  # just before its next heartbeat was due
    )
    assert problem == RingProblem("has not responded for 10 s (limit 10 s)", 1)
    assert 59 <= at < 60


def test_timeouts_restart_after_the_front_slept() -> None:
    watch = RingWatch(1, TIMEOUTS, 0)
    watch.on_message(0, heartbeat("decode", 1), 0)
    assert watch.check(0.5) is None
    assert watch.check(5000) is None
    assert watch.check(5001) is None
