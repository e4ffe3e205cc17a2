"""Who is missed, and when: silence, dead links, work that does not go on; and what is no reason for alarm."""

from __future__ import annotations

from typing import Any

from kimi_mlx.cluster.ring.watch import RingProblem, RingTimeouts, RingWatch

LIMITS = RingTimeouts(silence_s=10, step_s=10, stall_s=300)


def alive(work: str = "idle", step: int = 0, **links: float) -> dict[str, Any]:
    return {"kind": "alive", "work": work, "step": step, "links": {name[1:]: age for name, age in links.items()}}


def run(seconds: float, *beats: Any, start: float = 0) -> tuple[RingProblem | None, float]:
    """Two ranks that say every second what `beats` gives for the second; when something is found, and what."""
    watch = RingWatch(2, LIMITS, start)
    now = start
    while now < start + seconds:
        for rank, beat in enumerate(beats):
            if (message := beat(now)) is not None:
                watch.on_message(rank, message, now)
        for part in range(4):
            if (problem := watch.check(now + part / 4)) is not None:
                return problem, now + part / 4
        now += 1
    return None, now


def test_idle_ranks_may_be_idle_for_ever() -> None:
    assert run(20_000, lambda now: alive(), lambda now: alive())[0] is None


def test_a_silent_rank_is_found_in_time() -> None:
    problem, at = run(100, lambda now: alive(), lambda now: alive() if now < 20 else None)
    assert problem == RingProblem("has not responded for 10 s (limit 10 s)", 1)
    assert 19 + 10 <= at < 20 + 10.5


def test_a_long_load_or_prefill_that_goes_on_is_none_of_our_business() -> None:
    for work in ("load", "prefill"):
        problem, _ = run(5000, *[lambda now, work=work: alive(work, int(now) // 290)] * 2)
        assert problem is None
        problem, at = run(5000, *[lambda now, work=work: alive(work, 1)] * 2)
        assert problem is not None
        assert problem.is_stall
        assert f"no progress in {work} for 300 s" in problem.message
        assert at < 302


def test_tokens_that_stop_coming_are_missed_soon() -> None:
    problem, at = run(100, *[lambda now: alive("decode", int(min(now, 30)))] * 2)
    assert problem == RingProblem("no progress in decode for 10 s, though all ranks are alive", is_stall=True)
    assert 40 <= at < 41
    # one that still reads the prompt may take its time
    assert run(100, lambda now: alive("decode", 1), lambda now: alive("prefill", 1))[0] is None


def test_a_dead_link_is_told_from_a_dead_rank() -> None:
    def hears_until(end: float, peer: int) -> Any:
        return lambda now: alive("prefill", 1, **{f"r{peer}": max(now - end, 0.2)})

    problem, at = run(100, hears_until(50, 1), hears_until(50, 0))
    assert problem is not None
    assert (problem.rank, problem.is_stall) == (0, True)
    assert "has received nothing from rank 1 for 10 s" in problem.message
    assert 60 <= at < 61
    dead = hears_until(50, 0)
    problem, _ = run(100, hears_until(50, 1), lambda now: dead(now) if now < 50 else None)
    assert problem is not None
    assert (problem.rank, problem.message[:17]) == (1, "has not responded")


def test_a_stopped_rank_is_not_taken_for_a_dead_link() -> None:
    problem, at = run(
        100,
        lambda now: alive("prefill", 1, r1=max(now - 50, 0.2)),
        lambda now: alive("prefill", 1, r0=0.9) if now < 50 else None,  # its last word came just before the next one
    )
    assert problem == RingProblem("has not responded for 10 s (limit 10 s)", 1)
    assert 59 <= at < 60


def test_a_front_that_slept_gives_everybody_time_anew() -> None:
    watch = RingWatch(1, LIMITS, 0)
    watch.on_message(0, alive("decode", 1), 0)
    assert watch.check(0.5) is None
    assert watch.check(5000) is None
    assert watch.check(5001) is None
