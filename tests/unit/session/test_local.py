"""A session in this process: a failed step ends its own requests, and no others."""

from __future__ import annotations

import gc
import queue
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import mlx.core as mx
import pytest

from kimi_mlx.engine.events import Event, Finished, Prefilled, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError, StepError
from kimi_mlx.model.decoder import Model
from kimi_mlx.session import local as local_session
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.session import SessionOptions
from kimi_mlx.sizing.expert_memory import ExpertMemory
from tests.fakes import KIMI_MINI


@pytest.fixture(scope="module")
def session() -> Iterator[LocalSession]:
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as opened:
        yield opened


def tokens_of(session: LocalSession, length: int = 40) -> list[int]:
    events = list(session.generate(Request(tuple(range(20, 20 + length)), max_tokens=5)))
    assert isinstance(events[-1], Finished)
    return [event.id for event in events if isinstance(event, Token)]


def test_after_a_failed_step_the_next_request_is_answered(
    session: LocalSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens_of(session)
    forward, calls = Model.hidden, 0

    def failing(self: Model, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 2:  # in the middle of an answer
            raise RuntimeError("[malloc] Unable to allocate 9 bytes.")
        return forward(self, *args)

    monkeypatch.setattr(Model, "hidden", failing)
    with pytest.raises(StepError, match="Unable to allocate 9 bytes"):
        tokens_of(session)
    status = session.status()
    assert (status.is_up, status.active, status.waiting, status.cached_tokens) == (False, 0, 0, 0)
    assert status.reason is not None
    assert "Unable to allocate" in status.reason
    with monkeypatch.context() as patch:
        patch.setattr(local_session, "FAILED_STEP_DOWN_S", 0.0)
        assert session.status().is_up  # after FAILED_STEP_DOWN_S, without a new request
    monkeypatch.undo()
    assert tokens_of(session) == expected
    assert session.status().is_up


def test_all_requests_of_a_failed_step_get_the_error(session: LocalSession, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Model, *args: Any) -> Any:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Model, "hidden", failing)
    events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
    for i in range(20):
        session.submit(Request((30, 31, i), max_tokens=5), events.put)
    num_unfinished = 20
    while num_unfinished:
        event = events.get(timeout=10)
        num_unfinished -= isinstance(event, StepError)
        assert isinstance(event, StepError | Prefilled)
    assert session.status().waiting == 0


def test_closing_releases_the_memory_of_the_model(session: LocalSession) -> None:
    """Also after a failed step, whose error refers to frames that hold the model."""
    gc.collect()  # what earlier tests have left
    before_bytes = mx.get_active_memory()
    other = LocalSession(SessionOptions(KIMI_MINI))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "hidden", lambda self, *args: 1 / 0)
        patch.setattr(local_session.LOG, "exception", print)  # pytest keeps log records, with their frames
        with pytest.raises(StepError):
            tokens_of(other)
    tokens_of(other)
    assert mx.get_active_memory() > before_bytes + 1_000_000
    other.close()
    assert mx.get_active_memory() < before_bytes + 1000
    assert not other.status().is_up
    with pytest.raises(EngineError, match="the session is closed"):
        tokens_of(other)
    other.close()


@pytest.mark.slow
def test_experts_are_read_from_the_disk_if_the_options_say_so(session: LocalSession) -> None:
    assert session.status().memory[0].expert_budget is None
    options = SessionOptions(KIMI_MINI, expert_memory=ExpertMemory.parse("50%"))
    with closing(LocalSession(options)) as streamed:
        assert tokens_of(streamed) == tokens_of(session)
        budget = streamed.status().memory[0].expert_budget
    assert budget is not None
    assert 0 < budget.kept_share < 0.5
