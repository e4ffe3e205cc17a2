"""Counters of experts read from the disk: in an answer's statistics, in the status, and added up over ranks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest

from kimi_mlx.engine.events import Finished, Statistics
from kimi_mlx.engine.request import Request
from kimi_mlx.model.expert_stats import TOTALS, ExpertStats
from kimi_mlx.session.job import Job
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.sizing.expert_memory import ExpertMemory
from tests.fakes import KIMI_MINI

FIRST = ExpertStats(1, 2, 3, 0.5, 4, 3, 1, 5, kept_experts=6, num_experts=12, expert_bytes=7)
SECOND = ExpertStats(10, 20, 30, 0.25, 40, 30, 10, 50, kept_experts=2, num_experts=12, expert_bytes=9)


def answer(session: LocalSession, max_tokens: int) -> Statistics:
    *_, end = session.generate(Request((5, 6, 7, 8), max_tokens=max_tokens))
    assert isinstance(end, Finished)
    return end.statistics


def test_an_answer_counts_what_was_read_for_it() -> None:
    options = SessionOptions(KIMI_MINI, expert_memory=ExpertMemory.parse("60%"))
    with closing(LocalSession(options)) as session:
        before = session.status().experts[0]
        one, several = answer(session, 1), answer(session, 6)
        after = session.status().experts[0]
    assert one.experts is not None
    assert several.experts is not None
    assert one.experts.hits + one.experts.misses == 0  # a first token belongs to the prompt
    assert several.experts.hits + several.experts.misses > 0
    counted = one.prompt_read_bytes + several.prompt_read_bytes + several.experts.bytes_read
    assert 0 < counted <= after.since(before).bytes_read  # a step that ran ahead of the end belongs to no answer
    read = several.experts.misses + several.experts.guesses
    read -= several.experts.guesses_right + several.experts.guesses_cancelled
    assert several.read_bytes_per_token * 5 == several.experts.bytes_read == read * several.experts.expert_bytes
    assert Statistics.from_dict(several.to_dict()) == several


def test_nothing_is_counted_without_reads() -> None:
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as session:
        statistics = answer(session, 3)
        assert session.status().experts == {}
    assert (statistics.experts, statistics.prompt_read_bytes, statistics.read_bytes_per_token) == (None, 0, 0)


def test_totals_add_up_and_subtract() -> None:
    together = SECOND.with_earlier(FIRST)
    assert together.since(FIRST) == SECOND
    assert all(getattr(together, name) == getattr(FIRST, name) + getattr(SECOND, name) for name in TOTALS)
    ranks = ExpertStats.of_ranks([FIRST, SECOND])
    assert (ranks.hits, ranks.misses, ranks.bytes_read, ranks.kept_experts) == (11, 22, 33, 8)
    assert (ranks.wait_seconds, ranks.steps, ranks.expert_bytes) == (0.5, 50, 9)
    assert ranks.hit_rate == pytest.approx(1 / 3)
    assert ExpertStats().hit_rate is None


def test_the_end_of_an_answer_has_the_reads_of_all_ranks() -> None:
    job = Job(1, Request((1,)), lambda event: None)
    own = Statistics(1, 0, 3, 0.1, 0.2, 0, prompt_read_bytes=5, experts=FIRST)
    job.rank_statistics = {1: replace(own, prompt_read_bytes=6, experts=SECOND), 0: own}
    job.outcome = job.finish_event("stop", own)
    outcome = job.outcome_of_ranks()
    assert isinstance(outcome, Finished)
    assert outcome.statistics.prompt_read_bytes == 11
    assert outcome.statistics.experts == ExpertStats.of_ranks([FIRST, SECOND])
