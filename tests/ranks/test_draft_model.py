"""A draft model in one process and on rings, also after the loss of a rank; here with random weights."""

from __future__ import annotations

import os
import signal
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import ConfigError
from kimi_mlx.model.config import read_json
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import DEFAULT_DRAFT_TOKENS, Session, SessionOptions, stream_events
from tests.drafts import draft_config, write_draft
from tests.fakes import KIMI_MINI

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_draft(tmp_path_factory.mktemp("draft"), draft_config(read_json(KIMI_MINI / "config.json")))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    tokenizer = ChatTokenizer.load(KIMI_MINI)
    prompt = tuple(tokenizer.apply_chat_template([{"role": "user", "content": "Tell me about the sea."}]))
    greedy = Request(prompt, 60, stop_ids=tokenizer.stop_ids)
    return [greedy, replace(greedy, sampling=Sampling(temperature=0.9, top_p=0.95, seed=4))]


def run(session: Session, request: Request) -> tuple[list[int], Finished]:
    events = list(stream_events(session, request))
    assert isinstance(events[-1], Finished)
    return [event.id for event in events if isinstance(event, Token)], events[-1]


@pytest.fixture(scope="module")
def expected(requests: list[Request]) -> list[list[int]]:
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as session:
        assert session.status().drafts is None
        return [run(session, request)[0] for request in requests]


def test_one_process(draft: Path, requests: list[Request], expected: list[list[int]]) -> None:
    options = SessionOptions(KIMI_MINI, draft=draft)
    assert options.max_drafted == DEFAULT_DRAFT_TOKENS
    with closing(LocalSession(options)) as session:
        answers = [run(session, request) for request in requests]
        status = session.status().drafts
    assert [tokens for tokens, _ in answers] == expected
    drafted = sum(end.statistics.drafted_tokens for _, end in answers)
    assert status is not None
    assert (status.drafted_tokens, status.off_reason) == (drafted, answers[-1][1].statistics.drafts_off)
    assert 0 < drafted < 60  # the draft model knows nothing, so drafts soon end


def test_a_draft_model_of_another_model_is_refused(tmp_path: Path) -> None:
    config = draft_config(read_json(KIMI_MINI / "config.json"), target_hidden_size=96)
    with pytest.raises(ConfigError, match="96"):
        LocalSession(SessionOptions(KIMI_MINI, draft=write_draft(tmp_path, config)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["hybrid", pytest.param("pipeline", marks=pytest.mark.sweep)])
def test_a_ring_that_is_lost_during_an_answer(
    draft: Path, requests: list[Request], expected: list[list[int]], strategy: str
) -> None:
    options = SessionOptions(KIMI_MINI, ranks=2, strategy=strategy, draft=draft)
    with closing(RingSession(options)) as session:
        assert run(session, requests[0])[0] == expected[0]
        status = session.status().drafts
        assert status is not None
        assert status.drafted_tokens > 0
        tokens: list[int] = []
        for event in stream_events(session, requests[1]):
            if isinstance(event, Token):
                tokens.append(event.id)
            if len(tokens) == 3 and isinstance(event, Token):
                os.kill(session.pids[1], signal.SIGKILL)
        assert tokens == expected[1]
