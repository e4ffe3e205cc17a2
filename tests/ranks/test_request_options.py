"""Grammar, logit bias and log probabilities: in batches, with drafts, on rings, and after the loss of a rank."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from kimi_mlx.engine.events import Logprobs, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import EngineError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import Session, SessionOptions, stream_events
from kimi_mlx.text.grammar import build_grammar, detect_thinking
from tests.fakes import KIMI_MINI

pytestmark = pytest.mark.ranks

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 5},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(KIMI_MINI)


@pytest.fixture(scope="module")
def requests(tokenizer: ChatTokenizer) -> list[Request]:
    """Return a plain request, two with a schema (greedy, sampled), and one with a bias. All but one have logprobs."""
    prompt = tuple(tokenizer.apply_chat_template([{"role": "user", "content": "Invent a dog, please."}]))
    special = tokenizer.tokenizer.special_tokens
    plain = Request(prompt, 40, stop_ids=tokenizer.stop_ids)
    constrained = replace(
        plain,
        max_tokens=150,
        grammar=build_grammar(special, detect_thinking(special, prompt), SCHEMA),
        top_logprobs=2,
    )
    sampled = replace(constrained, sampling=Sampling(temperature=0.8, top_p=0.9, seed=3), top_logprobs=0)
    biased = replace(plain, logit_bias=((tokenizer.encode("a")[0], 100.0),), max_tokens=5, top_logprobs=1)
    return [plain, constrained, sampled, biased]


def tokens_of(session: Session, request: Request) -> list[Token]:
    return [event for event in stream_events(session, request) if isinstance(event, Token)]


def assert_equal(actual: list[Token], expected: list[Token]) -> None:
    """Check that the tokens are equal, and their log probabilities nearly so."""
    assert [token.id for token in actual] == [token.id for token in expected]
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.logprobs is None) == (theirs.logprobs is None)
        if mine.logprobs is not None and theirs.logprobs is not None:
            assert _numbers(mine.logprobs) == pytest.approx(_numbers(theirs.logprobs), abs=1e-3)


def _numbers(logprobs: Logprobs) -> list[float]:
    return [logprobs.token, *(value for _, value in logprobs.top)]


@pytest.fixture(scope="module")
def expected(requests: list[Request], tokenizer: ChatTokenizer) -> list[list[Token]]:
    """Return the answers of one process that gets one request at a time."""
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as session:
        answers = [tokens_of(session, request) for request in requests]
        with pytest.raises(EngineError, match="cannot be compiled"):
            tokens_of(session, replace(requests[0], grammar="start: ("))
    plain, *constrained, biased = answers
    for tokens in constrained:
        parser = tokenizer.output_parser(requests[1].prompt)
        deltas = [*(parser.add(token.id) for token in tokens), parser.finish()]
        value = json.loads("".join(delta.text for delta in deltas))
        assert set(value) == {"name", "ages"}
    for token in constrained[0]:
        assert token.logprobs is not None
        assert len(token.logprobs.top) == 2
        assert 0 >= token.logprobs.top[0][1] >= max(token.logprobs.token, token.logprobs.top[1][1])
    assert all(token.logprobs is None for token in plain)
    assert [token.id for token in biased] == [tokenizer.encode("a")[0]] * 5
    return answers


def answer_together(session: Session, requests: list[Request]) -> list[list[Token]]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: tokens_of(session, request), requests))


def test_in_a_batch_and_with_drafts(requests: list[Request], expected: list[list[Token]]) -> None:
    for speculate in (0, 5):
        with closing(LocalSession(SessionOptions(KIMI_MINI, speculate=speculate))) as session:
            for actual, alone in zip(answer_together(session, requests), expected, strict=True):
                assert_equal(actual, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "speculate"),
    [
        pytest.param("expert", 0, marks=pytest.mark.sweep),
        pytest.param("pipeline", 0, marks=pytest.mark.sweep),
        ("pipeline", 5),
    ],
)
def test_on_a_ring_that_is_lost_during_an_answer(
    requests: list[Request],
    expected: list[list[Token]],
    strategy: str,
    speculate: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    options = SessionOptions(KIMI_MINI, ranks=2, strategy=strategy, speculate=speculate)
    with closing(RingSession(options)) as session:
        with pytest.raises(EngineError, match="cannot be compiled"):
            tokens_of(session, replace(requests[0], grammar="start: ("))
        for actual, alone in zip(answer_together(session, requests), expected, strict=True):
            assert_equal(actual, alone)
        seen: list[Token] = []
        for event in stream_events(session, requests[1]):
            if isinstance(event, Token):
                seen.append(event)
                if len(seen) == 20:
                    os.kill(session.pids[1], signal.SIGKILL)
        assert_equal(seen, expected[1])
        assert session.status().restarts == 1
