"""Penalties, bias and minimum length in the engine: alone, in a batch, and resumed in the middle."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import load_golden, write_checkpoint
from tests.unit.engine.test_logits_processor import expected_logits

GOLDEN = load_golden("k2")
PROMPT = tuple(np.random.default_rng(1).integers(0, 192, 20).tolist())
PENALTIES = Sampling(frequency_penalty=0.3, presence_penalty=0.2, repetition_penalty=1.2)
STOPS = frozenset(range(0, 192, 5))

REQUESTS = [
    Request(PROMPT, 15, sampling=PENALTIES),
    Request(PROMPT, 15, sampling=Sampling(frequency_penalty=-1.5)),
    Request(PROMPT, 15, sampling=PENALTIES, logit_bias=((7, 4.0), (8, -3.0)), stop_ids=STOPS, min_tokens=6),
    Request(PROMPT, 15, stop_ids=STOPS, min_tokens=15),
    Request(PROMPT, 15),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2"), GOLDEN.config, GOLDEN.seed)
    return load_model(folder, load_config(folder), mx.float32)


def answer_together(engine: Engine, requests: list[Request]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in requests]
    for number, request in enumerate(requests):
        engine.add(number, request)
    while not engine.is_idle:
        for number, event in engine.step():
            assert not isinstance(event, KimiMlxError)
            if isinstance(event, Token):
                answers[number].append(event.id)
            elif isinstance(event, Finished):
                assert (event.reason == "stop") == (answers[number][-1] in requests[number].stop_ids)
    return answers


@pytest.fixture(scope="module")
def expected(model: Model) -> list[list[int]]:
    """Decode greedily from logits that are changed one after the other, without the engine."""
    answers: list[list[int]] = []
    for request in REQUESTS:
        answer: list[int] = []
        cache, new = model.make_cache(), list(request.prompt)
        while len(answer) < 15 and not (answer and answer[-1] in request.stop_ids):
            logits = np.array(model(mx.array([new]), cache)[0, -1])
            answer.append(int(expected_logits(logits, request, answer).argmax()))
            new = answer[-1:]
        answers.append(answer)
    return answers


def test_text_is_that_of_the_formulas(model: Model, expected: list[list[int]]) -> None:
    assert answer_together(Engine(model), REQUESTS) == expected
    assert [answer_together(Engine(model), [request])[0] for request in REQUESTS] == expected
    assert len(set(map(tuple, expected))) == len(expected)
    assert len(expected[2]) > 6
    assert len(expected[3]) == 15


@pytest.mark.parametrize("sent", [1, 5, 9])
def test_an_answer_that_is_resumed_continues_as_before(model: Model, expected: list[list[int]], sent: int) -> None:
    for request, tokens in zip(REQUESTS, expected, strict=True):
        if sent < len(tokens):
            rest = replace(request, prompt=(*request.prompt, *tokens[:sent]), max_tokens=15 - sent, answered=sent)
            assert answer_together(Engine(model), [Request.from_dict(rest.to_dict())]) == [tokens[sent:]]
