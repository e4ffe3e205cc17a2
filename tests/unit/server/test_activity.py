"""Rates of tokens and the progress of answers."""

from __future__ import annotations

from kimi_mlx.server.activity import INTERVAL_S, NUM_INTERVALS, AnswerProgress, RateCounter


def test_rates_are_those_of_complete_intervals() -> None:
    now = 0.0
    counter = RateCounter(lambda: now)
    assert counter.rates().completion_tok_per_s == 0
    for _ in range(4):
        counter.add(prompt=100, completion=10)
        now += INTERVAL_S
    rates = counter.rates()
    assert (rates.prompt_tokens, rates.completion_tokens) == ((100,) * 4, (10,) * 4)
    assert (rates.prompt_tok_per_s, rates.completion_tok_per_s) == (100 / INTERVAL_S, 10 / INTERVAL_S)
    now += 2 * INTERVAL_S
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
