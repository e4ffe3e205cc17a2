"""Grammar, logit bias and log probabilities: in batches, with drafts, on rings, and after the loss of a rank."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from kimi_mlx.engine.events import Logprobs, PromptLogprobs, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import EngineError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.session.local import LocalSession
from kimi_mlx.session.ring import RingSession
from kimi_mlx.session.session import Session, SessionOptions, stream_events
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.text.grammar import build_grammar, detect_thinking
from kimi_mlx.text.messages import ToolCall
from tests.fakes import KIMI_MINI

pytestmark = pytest.mark.ranks

KIMI_MINI_VL = KIMI_MINI.with_name("kimi-mini-vl")
KIMI_MINI_DRAFT = KIMI_MINI.with_name("kimi-mini-draft")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 150}, "maxItems": 5},
    },
    "required": ["name", "ages"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer.load(KIMI_MINI)


@pytest.fixture(scope="module")
def requests(tokenizer: ChatTokenizer) -> list[Request]:
    """Return a plain request, two with a schema (greedy, sampled), one with a bias, two with penalties, and a call.

    The second one with penalties has a minimum length, too. The model makes the call by its own choice.
    """
    prompt = tuple(tokenizer.apply_chat_template([{"role": "user", "content": "Invent a dog, please."}]))
    special = tokenizer.tokenizer.special_tokens
    plain = Request(prompt, 40, stop_ids=tokenizer.stop_ids)
    constrained = replace(
        plain,
        max_tokens=150,
        grammar=build_grammar(special, detect_thinking(special, prompt), SCHEMA),
        top_logprobs=2,
    )
    sampled = replace(constrained, sampling=Sampling(temperature=0.8, top_p=0.9, seed=1), top_logprobs=0)
    biased = replace(plain, logit_bias=((tokenizer.encode("a")[0], 100.0),), max_tokens=5, top_logprobs=1)
    penalties = Sampling(frequency_penalty=2, presence_penalty=2, repetition_penalty=4)
    penalized = replace(plain, sampling=penalties, min_tokens=35, top_logprobs=1)
    warm = replace(penalties, temperature=0.9, seed=4)
    longer = replace(penalized, sampling=warm, top_logprobs=None)
    tool = {"type": "function", "function": {"name": "note", "parameters": SCHEMA}}
    called = replace(
        sampled,
        grammar=build_grammar(special, detect_thinking(special, prompt), tools=[tool], parallel_tool_calls=False),
        logit_bias=((special["<|tool_calls_section_begin|>"], 100.0),),
    )
    return [plain, constrained, sampled, biased, penalized, longer, called]


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
    plain, *constrained, biased, penalized, longer, called = answers
    parser = tokenizer.output_parser(requests[-1].prompt)
    calls = [call for token in called for call in parser.add(token.id).tool_calls]
    assert [(call.name, set(json.loads(call.arguments))) for call in calls if isinstance(call, ToolCall)] == [
        ("note", {"name", "ages"})
    ]
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
    assert len(penalized) >= 35 <= len(longer)
    assert len({token.id for token in penalized}) > 25
    return answers


def scores_of(session: Session, request: Request) -> list[Logprobs]:
    """Return the log probabilities of the prompt of a request."""
    events = (event for event in stream_events(session, request) if isinstance(event, PromptLogprobs))
    return [logprobs for event in events for logprobs in event.tokens]


def assert_scores(session: Session, expected: list[list[float]], requests: list[Request]) -> None:
    """Check the log probabilities of two prompts at once, with and without new tokens."""
    with ThreadPoolExecutor(2) as pool:
        for scores, numbers in zip(pool.map(lambda each: scores_of(session, each), requests), expected, strict=True):
            assert [number for score in scores for number in _numbers(score)] == pytest.approx(numbers, abs=1e-3)


@pytest.fixture(scope="module")
def scored(requests: list[Request]) -> list[Request]:
    return [
        replace(requests[0], prompt=requests[0].prompt * 6, prompt_logprobs=2, max_tokens=20),
        replace(requests[0], prompt_logprobs=0, max_tokens=0),
    ]


@pytest.fixture(scope="module")
def scores(scored: list[Request]) -> list[list[float]]:
    with closing(LocalSession(SessionOptions(KIMI_MINI))) as session:
        return [[number for score in scores_of(session, each) for number in _numbers(score)] for each in scored]


def answer_together(session: Session, requests: list[Request]) -> list[list[Token]]:
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: tokens_of(session, request), requests))


@pytest.mark.slow
def test_in_a_batch_and_with_drafts(
    requests: list[Request], expected: list[list[Token]], scored: list[Request], scores: list[list[float]]
) -> None:
    plain = SessionOptions(KIMI_MINI)
    streamed = replace(plain, expert_memory=ExpertMemory("size", share=0.5))
    for options in (plain, replace(plain, speculate=5), replace(plain, draft=KIMI_MINI_DRAFT), streamed):
        with closing(LocalSession(options)) as session:
            for actual, alone in zip(answer_together(session, requests), expected, strict=True):
                assert_equal(actual, alone)
            assert_scores(session, scores, scored)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "drafts"),
    [
        pytest.param("expert", {}, marks=pytest.mark.sweep),
        pytest.param("tensor", {}, marks=pytest.mark.sweep),
        pytest.param("pipeline", {}, marks=pytest.mark.sweep),
        pytest.param("hybrid", {"draft": KIMI_MINI_DRAFT}, marks=pytest.mark.sweep),
        ("pipeline", {"speculate": 5, "draft": KIMI_MINI_DRAFT}),
    ],
)
def test_on_a_ring_that_is_lost_during_an_answer(
    requests: list[Request],
    expected: list[list[Token]],
    scored: list[Request],
    scores: list[list[float]],
    strategy: str,
    drafts: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    options = SessionOptions(KIMI_MINI, ranks=2, strategy=strategy, **drafts)
    with closing(RingSession(options)) as session:
        with pytest.raises(EngineError, match="cannot be compiled"):
            tokens_of(session, replace(requests[0], grammar="start: ("))
        for actual, alone in zip(answer_together(session, requests), expected, strict=True):
            assert_equal(actual, alone)
        assert_scores(session, scores, scored)
        for restarts, number in enumerate((1, 4), 1):
            seen: list[Token] = []
            for event in stream_events(session, requests[number]):
                if isinstance(event, Token):
                    seen.append(event)
                    if len(seen) == 5:
                        os.kill(session.pids[1], signal.SIGKILL)
            assert_equal(seen, expected[number])
            deadline = time.monotonic() + 60  # on a busy machine the answer may be complete before the rank is lost
            while session.status().restarts < restarts and time.monotonic() < deadline:
                time.sleep(0.05)
            assert session.status().restarts == restarts


@pytest.fixture(scope="module")
def with_images() -> list[Request]:
    """Return prompts with images: with a schema, two samples of one prompt with it, and the other image alone."""
    tokenizer = ChatTokenizer.load(KIMI_MINI_VL)
    special = tokenizer.tokenizer.special_tokens

    def make(*colors: str, **values: Any) -> Request:
        images = [{"type": "image", "image": _picture(color)} for color in colors]
        content = [*images, {"type": "text", "text": "What do you see?"}]
        prompt = tokenizer.prompt([{"role": "user", "content": content}])
        return Request(tuple(prompt.ids), stop_ids=tokenizer.stop_ids, images=tuple(prompt.images), **values)

    both = make("red", "blue", max_tokens=120, top_logprobs=1)
    schema = replace(both, grammar=build_grammar(special, detect_thinking(special, both.prompt), SCHEMA))
    samples = [replace(schema, sampling=Sampling(temperature=0.8, seed=seed)) for seed in (1, 2)]
    return [schema, *samples, make("blue", "red", max_tokens=20)]


def _picture(color: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (112, 112), color).save(file, "PNG")
    return file.getvalue()


@pytest.mark.sweep
def test_schemas_samples_and_drafts_with_images(with_images: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_mlx.session.restart_policy.RESTART_DELAYS_S", (0.1,))
    tokenizer = ChatTokenizer.load(KIMI_MINI_VL)
    expected: list[list[Token]] = []
    for request in with_images:
        with closing(LocalSession(SessionOptions(KIMI_MINI_VL))) as alone:
            expected.append(tokens_of(alone, request))
    for request, tokens in zip(with_images[:3], expected, strict=False):
        parser = tokenizer.output_parser(request.prompt)
        deltas = [*(parser.add(token.id) for token in tokens), parser.finish()]
        assert set(json.loads("".join(delta.text for delta in deltas))) == {"name", "ages"}
    with closing(LocalSession(SessionOptions(KIMI_MINI_VL, speculate=5))) as session:
        for actual, tokens in zip(answer_together(session, with_images), expected, strict=True):
            assert_equal(actual, tokens)
    for strategy in ("hybrid", "pipeline"):
        options = SessionOptions(KIMI_MINI_VL, ranks=2, strategy=strategy, speculate=3, check_every=1)
        with closing(RingSession(options)) as session:
            for actual, tokens in zip(answer_together(session, with_images), expected, strict=True):
                assert_equal(actual, tokens)
            seen: list[Token] = []
            for event in stream_events(session, with_images[1]):
                if isinstance(event, Token):
                    seen.append(event)
                    if len(seen) == 10:
                        os.kill(session.pids[0], signal.SIGKILL)
            assert_equal(seen, expected[1])
            assert session.status().restarts == 1
