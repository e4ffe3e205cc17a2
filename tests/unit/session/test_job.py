"""Jobs: the remaining request after an interruption, and the outcome."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.cluster.channel.messages import decode
from kimi_mlx.engine.events import Event, Finished, Statistics
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError
from kimi_mlx.session.job import Job
from kimi_mlx.session.session import DraftStatus

REQUEST = Request((1, 2, 3), max_tokens=5, stop_ids=frozenset([9]))
STATISTICS = Statistics(3, 2, 5, ttft_s=0.5, decode_s=1.0, peak_memory_bytes=7)


def make_job(sent_ids: list[int], request: Request = REQUEST) -> Job:
    events: list[Event | BaseException] = []
    return Job(4, request, events.append, sent_ids)


def test_sent_tokens_join_the_prompt() -> None:
    remaining = make_job([7, 8]).remaining_request()
    assert (remaining.prompt, remaining.max_tokens, remaining.answered) == ((1, 2, 3, 7, 8), 3, 2)
    assert make_job([7], Request((1,))).remaining_request().max_tokens is None
    message = decode(make_job([7, 8]).encode())
    assert (message["kind"], message["request_id"]) == ("request", 4)
    assert Request.from_dict(message["request"]) == remaining


@pytest.mark.parametrize(
    ("sent_ids", "context", "reason"),
    [([7], 100, None), ([7, 9], 100, "stop"), ([7] * 5, 100, "length"), ([7], 4, "length"), ([], 100, None)],
)
def test_an_answer_with_all_of_its_tokens_is_completed(sent_ids: list[int], context: int, reason: str | None) -> None:
    outcome = make_job(sent_ids).outcome_if_complete(context)
    assert (outcome.reason if isinstance(outcome, Finished) else outcome) == reason


def test_an_answer_without_tokens_waits_for_the_log_probabilities_of_its_prompt() -> None:
    request = Request((1, 2, 3), max_tokens=0, prompt_logprobs=1)
    job = make_job([], request)
    assert job.outcome_if_complete(3) is None
    assert job.remaining_request() == request
    job.next_logprob = 2
    assert job.remaining_request() == replace(request, next_logprob=2)
    job.next_logprob = 3
    assert job.remaining_request().prompt_logprobs is None


def test_a_cancelled_job_is_completed() -> None:
    job = make_job([7])
    job.is_cancelled = True
    outcome = job.outcome_if_complete(100)
    assert isinstance(outcome, Finished)
    assert outcome.reason == "cancelled"
    job.outcome = EngineError("no")
    assert job.outcome_if_complete(100) is job.outcome


def test_statistics_of_an_interrupted_answer_cover_all_of_it() -> None:
    job = make_job([7, 8, 9, 10, 11])
    assert job.finish_event("stop", STATISTICS) == Finished("stop", STATISTICS)
    job.was_interrupted = True
    statistics = job.finish_event("stop", STATISTICS).statistics
    assert (statistics.prompt_tokens, statistics.cached_tokens, statistics.generated_tokens) == (3, 2, 5)
    assert (statistics.peak_memory_bytes, statistics.decode_s) == (7, 0)
    assert statistics.ttft_s > 0


def test_draft_tokens_of_an_interrupted_answer_are_those_that_the_status_counts() -> None:
    job = make_job([7, 8, 9])
    job.was_interrupted = True
    ended = replace(STATISTICS, drafted_tokens=6, accepted_tokens=4, drafts_off="a reason")
    assert DraftStatus().after(job.finish_event("stop", ended).statistics) == DraftStatus(6, 4, "a reason")
