"""Text does not depend on drafts, in any order of modes: steps ahead, steps with drafts, and back."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine import engine as engine_module
from kimi_mlx.engine.drafts.planner import FIRST_PROBE_STEPS
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Prefilled, Token
from kimi_mlx.engine.kv_cache_pool import SequenceCache
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.sizing import engine_limits
from kimi_mlx.weights.assemble import load_model
from scripts.oracle import Oracle
from tests.checkpoints import load_golden, write_checkpoint
from tests.drafters import RandomPlanner

GOLDEN = load_golden("k2")
Answers = dict[int, tuple[list[int], str]]


def make_prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 192, length).tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2"), GOLDEN.config, GOLDEN.seed)
    return load_model(folder, load_config(folder), mx.float32)


REQUESTS = [
    Request(make_prompt(40, 1), max_tokens=30),
    Request(make_prompt(5, 2), max_tokens=1),
    Request(make_prompt(20, 3), max_tokens=2),
    Request(make_prompt(33, 4), max_tokens=25, sampling=Sampling(temperature=1.0, seed=3)),
    Request(make_prompt(3, 5), max_tokens=40, sampling=Sampling(temperature=1.4, top_p=0.9, min_p=0.01, seed=5)),
    Request(make_prompt(9, 6), max_tokens=12, logit_bias=((7, 3.0),), top_logprobs=2),
    Request(
        make_prompt(30, 7),
        max_tokens=25,
        stop_ids=frozenset(range(0, 192, 4)),
        min_tokens=9,
        sampling=Sampling(frequency_penalty=0.4, presence_penalty=0.5, repetition_penalty=1.3),
    ),
    Request(make_prompt(12, 8), max_tokens=25, sampling=Sampling(temperature=0.8, seed=2, frequency_penalty=-0.6)),
]


def answer(
    engine: Engine,
    requests: ListOf[Request],
    at_once: int = 2,
    cancelled: tuple[int, int] | None = None,
) -> Answers:
    """Return tokens and reasons by request.

    Args:
        engine: the engine.
        requests: requests; one is added in each step, `at_once` in the first.
        at_once: number of requests of the first step.
        cancelled: step after which a request is cancelled, and its index.
    """
    waiting, answers = list(enumerate(requests)), {number: ([], "") for number in range(len(requests))}
    steps = 0
    while waiting or not engine.is_idle:
        for number, request in waiting[: 1 if steps else at_once]:
            engine.add(number, request)
        waiting = waiting[1 if steps else at_once :]
        for number, event in engine.step():
            assert not isinstance(event, KimiMlxError)
            if isinstance(event, Token):
                answers[number][0].append(event.id)
            elif isinstance(event, Finished):
                answers[number] = answers[number][0], event.reason
        steps += 1
        if cancelled is not None and steps == cancelled[0]:
            engine.cancel(cancelled[1])
    return answers


@pytest.fixture(scope="module")
def expected(model: Model) -> Answers:
    return answer(Engine(model, prefill_chunk=16), REQUESTS)


@pytest.fixture
def random_modes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RandomPlanner]]:
    planners: list[RandomPlanner] = []

    def make(*args: object) -> RandomPlanner:
        planners.append(RandomPlanner(*args))  # pyright: ignore[reportArgumentType]
        return planners[-1]

    monkeypatch.setattr(engine_module, "DraftPlanner", make)
    yield planners
    modes = [mode for planner in planners for mode in planner.modes]
    assert {True, False} <= set(modes)


def oracle(answers: Answers, acceptance: float, requests: ListOf[Request] = REQUESTS) -> Oracle:
    known = {request.prompt: answers[number][0] for number, request in enumerate(requests)}
    return Oracle(known, acceptance, GOLDEN.config["vocab_size"])


@pytest.mark.parametrize("acceptance", [0.7, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.0, 1.0))])
def test_text_is_the_same_in_any_order_of_modes(
    model: Model, expected: Answers, random_modes: list[RandomPlanner], acceptance: float
) -> None:
    drafter = oracle(expected, acceptance)
    engine = Engine(model, prefill_chunk=16, speculate=5, drafters=[drafter])
    assert answer(engine, REQUESTS) == expected
    assert max(drafter.lengths) > 3
    assert engine.drafts is not None
    share = engine.drafts.num_accepted / engine.drafts.num_drafted
    assert (share == 0) == (acceptance == 0)
    assert (share == 1) == (acceptance == 1)


@pytest.mark.parametrize("steps", [4, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (1, 7, 12))])
def test_a_cancelled_request_leaves_the_others_alone(
    model: Model, expected: Answers, random_modes: list[RandomPlanner], steps: int
) -> None:
    engine = Engine(model, prefill_chunk=16, speculate=5, drafters=[oracle(expected, 0.6)])
    answers = answer(engine, REQUESTS, at_once=4, cancelled=(steps, 0))
    assert answers[0][1] == "cancelled"
    assert answers[0][0] == expected[0][0][: len(answers[0][0])]
    others = range(1, len(REQUESTS))
    assert {number: answers[number] for number in others} == {number: expected[number] for number in others}
    again = answer(engine, REQUESTS[:1])  # on the cached rows
    assert again[0] == expected[0]


def test_a_stop_token_inside_a_draft_ends_the_answer(
    model: Model, expected: Answers, random_modes: list[RandomPlanner]
) -> None:
    stop = expected[0][0][9]
    requests = [replace(REQUESTS[0], stop_ids=frozenset({stop}))] * 6
    end = expected[0][0].index(stop) + 1
    drafter = Oracle({REQUESTS[0].prompt: expected[0][0]}, 1.0, 192)
    answers = answer(Engine(model, speculate=8, drafters=[drafter]), requests, at_once=1)
    assert answers == dict.fromkeys(range(6), (expected[0][0][:end], "stop"))


@pytest.mark.slow
def test_preempted_requests_resume(
    model: Model, random_modes: list[RandomPlanner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_limits, "MIN_CACHE_TOKENS", 0)
    layers, width = len(model.layers), model.config.kv_lora_rank + model.config.qk_rope_head_dim
    requests = [Request(make_prompt(246, seed=number), max_tokens=20) for number in range(4)]
    expected = answer(Engine(model), requests)
    drafter = oracle(expected, 0.7, requests)
    engine = Engine(model, cache_bytes=768 * layers * width * 4, speculate=4, drafters=[drafter])
    begun: list[int] = []
    begin = Sequence.begin

    def count(self: Sequence, cache: SequenceCache, cached: int) -> None:
        begun.append(self.request_id)
        begin(self, cache, cached)

    monkeypatch.setattr(Sequence, "begin", count)
    assert answer(engine, requests, at_once=4) == expected
    assert len(begun) > len(requests)


def test_prompt_lookup_accepts_what_repeats(model: Model, random_modes: list[RandomPlanner]) -> None:
    request = Request(make_prompt(5, 4), max_tokens=40, logit_bias=((7, 100.0),))
    expected = answer(Engine(model), [request])
    engine = Engine(model, speculate=4)
    assert answer(engine, [request]) == expected
    assert engine.drafts is not None
    assert engine.drafts.num_accepted > 10


def test_progress_is_the_same_with_drafts(model: Model, expected: Answers) -> None:
    engine = Engine(model, prefill_chunk=16, speculate=4, drafters=[oracle(expected, 1.0)])
    events = list(engine.generate(REQUESTS[0]))
    assert [event.done for event in events if isinstance(event, Prefilled)] == [0, 16, 32, 40]


@pytest.mark.slow
def test_drafts_that_are_always_wrong_are_few(model: Model) -> None:
    request = Request(make_prompt(20, 3), max_tokens=200)
    expected = answer(Engine(model), [request])
    drafter = Oracle({}, 0.0, 192)
    engine = Engine(model, speculate=7, drafters=[drafter])
    engine.measure_steps()
    assert answer(engine, [request]) == expected
    assert len(drafter.lengths) <= 8 + 200 // FIRST_PROBE_STEPS
    assert engine.drafts is not None
    assert engine.drafts.num_drafted <= 60
    assert engine.drafts.off_reason is not None
