"""Log probabilities of prompts: those of the model's logits, in chunks, batches, with drafts, caches and preemption."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine import step_runner
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Logprobs, PromptLogprobs, Token
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sample import logprobs_of
from kimi_mlx.errors import EngineError, KimiMlxError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.sizing import engine_limits
from kimi_mlx.weights.assemble import load_model
from scripts.oracle import Oracle
from tests.checkpoints import load_golden, write_checkpoint

GOLDEN = load_golden("k2")


def make_prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 192, length).tolist())


REQUESTS = [
    Request(make_prompt(40, 1), max_tokens=6, prompt_logprobs=3),
    Request(make_prompt(40, 1)[:25], max_tokens=0, prompt_logprobs=1),
    Request(make_prompt(7, 2), max_tokens=4, prompt_logprobs=0, top_logprobs=2),
    Request(make_prompt(33, 3), max_tokens=12),
    Request(make_prompt(1, 4), max_tokens=1, prompt_logprobs=2),
    Request(make_prompt(1, 5), max_tokens=0, prompt_logprobs=2),
    Request(make_prompt(30, 6), max_tokens=3, prompt_logprobs=2, next_logprob=20),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2"), GOLDEN.config, GOLDEN.seed)
    return load_model(folder, load_config(folder), mx.float32)


class Answer:
    """Events of one request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[Logprobs] = []
        self.end: Finished | None = None


def answer(engine: Engine, requests: list[Request]) -> list[Answer]:
    """Answer requests together; check the order of their events."""
    answers = [Answer() for _ in requests]
    for number, request in enumerate(requests):
        engine.add(number, request)
    while not engine.is_idle:
        for number, event in engine.step():
            assert not isinstance(event, KimiMlxError)
            found = answers[number]
            if isinstance(event, PromptLogprobs):
                assert not found.tokens
                assert event.start == requests[number].next_logprob + len(found.logprobs)
                found.logprobs += event.tokens
            elif isinstance(event, Token):
                found.tokens.append(event.id)
            elif isinstance(event, Finished):
                found.end = event
    return answers


def check(model: Model, request: Request, found: Answer) -> None:
    """Check log probabilities against the logits of one forward pass, and the text against that without them."""
    assert found.end is not None
    assert len(found.tokens) == request.max_tokens
    assert found.end.statistics.generated_tokens == request.max_tokens
    if request.prompt_logprobs is None:
        assert not found.logprobs
        return
    logits = np.array(model(mx.array([request.prompt]))[0], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    assert len(found.logprobs) == len(request.prompt) - request.next_logprob
    for position, actual in enumerate(found.logprobs, request.next_logprob):
        row = logprobs[position - 1]
        assert actual.token == pytest.approx(row[request.prompt[position]], abs=1e-4)
        best = np.argsort(-row)[: request.prompt_logprobs]
        assert [id for id, _ in actual.top] == best.tolist()
        assert [value for _, value in actual.top] == pytest.approx(row[best].tolist(), abs=1e-4)
        for id, value in actual.top:
            assert id != request.prompt[position] or value == actual.token  # clients compare them for equality


@pytest.fixture(scope="module")
def texts(model: Model) -> list[list[int]]:
    plain = [replace(request, prompt_logprobs=None, next_logprob=1) for request in REQUESTS]
    return [answer(Engine(model), [request])[0].tokens for request in plain]


@pytest.mark.parametrize(
    ("chunk", "rows"),
    [pytest.param(512, 64, marks=pytest.mark.slow), (16, 5), pytest.param(1, 64, marks=pytest.mark.slow)],
)
def test_prompt_logprobs_equal_those_of_the_logits(
    model: Model, texts: list[list[int]], chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_runner, "PROMPT_ROWS", rows)
    for requests in ([request] for request in REQUESTS), [REQUESTS]:
        for together in requests:
            for request, found in zip(together, answer(Engine(model, prefill_chunk=chunk), together), strict=True):
                check(model, request, found)
                assert found.tokens == texts[REQUESTS.index(request)]


def test_prompt_logprobs_are_the_same_with_drafts(model: Model, texts: list[list[int]]) -> None:
    known = {request.prompt: tokens for request, tokens in zip(REQUESTS, texts, strict=True)}
    engine = Engine(model, prefill_chunk=16, speculate=4, drafters=[Oracle(known, 1.0, 192)])
    for request, found in zip(REQUESTS, answer(engine, REQUESTS), strict=True):
        check(model, request, found)
        assert found.tokens == known[request.prompt]


def test_a_cache_hides_no_position_and_is_used_otherwise(model: Model) -> None:
    engine = Engine(model)
    plain = replace(REQUESTS[0], prompt_logprobs=None)
    for request, num_cached in [(plain, 0), (REQUESTS[0], 0), (plain, 39), (replace(REQUESTS[0], next_logprob=30), 29)]:
        (found,) = answer(engine, [request])
        check(model, request, found)
        assert found.end is not None
        assert found.end.statistics.cached_tokens == num_cached


@pytest.mark.slow
def test_a_prompt_may_fill_the_context_if_nothing_follows(model: Model) -> None:
    full = Request(make_prompt(model.config.max_position_embeddings, 1), max_tokens=0, prompt_logprobs=1)
    check(model, full, answer(Engine(model), [full])[0])
    with pytest.raises(EngineError, match="the context holds"):
        Engine(model).add(0, replace(full, max_tokens=1))


@pytest.mark.slow
def test_preempted_requests_resume(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_limits, "MIN_CACHE_TOKENS", 0)
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    requests = [Request(make_prompt(246, seed), max_tokens=20, prompt_logprobs=1) for seed in range(4)]
    engine = Engine(model, cache_bytes=768 * len(model.layers) * width * 4, prefill_chunk=32)
    for request, found in zip(requests, answer(engine, requests), strict=True):
        check(model, request, found)


@pytest.mark.parametrize("vocab_size", [7, 256, 1000])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_most_likely_tokens(vocab_size: int, count: int) -> None:
    logits = np.random.default_rng(vocab_size).normal(size=(6, vocab_size)).astype(np.float32)
    found = logprobs_of(mx.array(logits), mx.zeros((6,), mx.int32), count)
    order = np.argsort(-logits, axis=-1)[:, :count]
    assert np.array(found.top_ids).tolist() == order.tolist()
    expected = np.take_along_axis(logits, order, axis=-1) - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.array(found.top), expected, atol=1e-5)
