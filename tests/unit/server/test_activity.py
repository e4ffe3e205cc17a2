"""Rates of tokens and the progress of answers."""

from __future__ import annotations

import pytest

from kimi_mlx.server.activity import INTERVAL_S, NUM_INTERVALS, RECENT_S, AnswerProgress, RateCounter


def test_rates_are_those_of_complete_intervals() -> None:
    now = 0.0
    counter = RateCounter(lambda: now)
    assert counter.rates().completion_tok_per_s == 0
    for _ in range(4):
        counter.add(prompt=100, completion=10)
        now += INTERVAL_S
    rates = counter.rates()
    assert (rates.prompt_tokens, rates.completion_tokens) == ((100,) * 4, (10,) * 4)


def test_the_current_rate_is_that_of_an_answer_that_has_just_begun() -> None:
    now = 1000.0
    counter = RateCounter(lambda: now)
    for _ in range(200):  # 50 tokens/s for 4 s, after a pause
        counter.add(completion=1)
        now += 0.02
    assert counter.rates().completion_tok_per_s == pytest.approx(50)
    for _ in range(400):  # then 20 tokens/s, for longer than the rate looks back
        counter.add(completion=1)
        now += 0.05
    assert counter.rates().completion_tok_per_s == pytest.approx(20, rel=0.05)
    now += RECENT_S + 1
    assert counter.rates().completion_tok_per_s == 0


def test_only_the_last_minutes_are_kept() -> None:
    now = 0.0
    counter = RateCounter(lambda: now)
    counter.add(completion=1)
    now += 10_000 * INTERVAL_S
    assert counter.rates().completion_tokens == (0,) * NUM_INTERVALS


def test_progress_counts_only_computed_tokens() -> None:
    progress = AnswerProgress(created_at=0)
    assert progress.describe(0).state == "waiting"
    progress.start()
    assert [progress.prefill(done, 100) for done in (20, 60, 100)] == [0, 40, 40]
    answer = progress.describe(0)
    assert (answer.state, answer.cached_tokens, answer.processed_tokens) == ("prefill", 20, 100)
    assert progress.describe(3).state == "decode"
    assert progress.prefill(10, 110) == 0  # again, after the ring was lost
    assert progress.prefill(110, 110) == 100
