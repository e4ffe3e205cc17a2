"""The engine on a small real model: greedy text, stops, limits, the cache across turns, cancellation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Prefilled, Statistics, Token
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.engine.token_array import TokenArray
from kimi_mlx.errors import EngineError, UsageError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device_traits import CPU_TUNING
from kimi_mlx.sizing import engine_limits, step_time
from kimi_mlx.sizing.engine_limits import StreamingLimits
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import load_golden, write_checkpoint

GOLDEN = load_golden("k2")
PROMPT = tuple(int(i) for i in GOLDEN.input_ids[0, :40])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2"), GOLDEN.config, GOLDEN.seed)
    return load_model(folder, load_config(folder), mx.float32)


def run(engine: Engine, request: Request) -> tuple[list[int], Finished]:
    """Return the new tokens and the final event."""
    events = list(engine.generate(request))
    assert isinstance(events[-1], Finished)
    return [event.id for event in events if isinstance(event, Token)], events[-1]


UncachedGreedy = Callable[[Sequence[int], int], list[int]]


@pytest.fixture(scope="module")
def greedy(model: Model) -> UncachedGreedy:
    """Decode without a cache: run the whole sequence for each token. Results are memoized."""
    answers: dict[tuple[int, ...], list[int]] = {}

    def answer(prompt: Sequence[int], count: int) -> list[int]:
        tokens = answers.setdefault(tuple(prompt), [])
        while len(tokens) < count:
            ids = mx.array([[*prompt, *tokens]])
            tokens.append(mx.argmax(model(ids)[0, -1]).tolist())  # pyright: ignore[reportArgumentType]
        return tokens[:count]

    return answer


@pytest.mark.parametrize("chunk", [7, 39, 40, *(pytest.param(chunk, marks=pytest.mark.slow) for chunk in (1, 512))])
def test_greedy_equals_decoding_without_a_cache(model: Model, greedy: UncachedGreedy, chunk: int) -> None:
    tokens, end = run(Engine(model, prefill_chunk=chunk), Request(PROMPT, max_tokens=12))
    assert tokens == greedy(PROMPT, 12)
    assert end.reason == "length"


def test_progress_covers_the_prompt_in_order(model: Model) -> None:
    events = list(Engine(model, prefill_chunk=16).generate(Request(PROMPT, max_tokens=1)))
    assert [event for event in events if isinstance(event, Prefilled)] == [
        Prefilled(done, 40) for done in (0, 16, 32, 40)
    ]


def test_a_stop_token_ends_the_answer_and_is_reported(model: Model, greedy: UncachedGreedy) -> None:
    expected = greedy(PROMPT, 12)
    stop = expected[5]
    tokens, end = run(Engine(model), Request(PROMPT, stop_ids=frozenset({stop}), max_tokens=12))
    assert tokens == expected[: expected.index(stop) + 1]
    assert end.reason == "stop"
    assert end.statistics.generated_tokens == len(tokens)


def test_cached_prefix_is_reused_and_only_new_tokens_are_prefilled(model: Model, greedy: UncachedGreedy) -> None:
    engine = Engine(model)
    first, _ = run(engine, Request(PROMPT, max_tokens=4))
    follow_up = (*PROMPT, *first, 5, 6, 7)
    second, end = run(engine, Request(follow_up, max_tokens=4))
    assert second == greedy(follow_up, 4)
    assert end.statistics.cached_tokens == len(PROMPT) + 3  # all but the last token, which was never computed
    changed = (*PROMPT[:20], 9, 9, *PROMPT[22:])
    third, end = run(engine, Request(changed, max_tokens=4))
    assert third == greedy(changed, 4)
    assert end.statistics.cached_tokens == 20


def test_the_same_prompt_again_computes_one_token(model: Model) -> None:
    engine = Engine(model)
    first, _ = run(engine, Request(PROMPT, max_tokens=5))
    again, end = run(engine, Request(PROMPT, max_tokens=5))
    assert again == first
    assert end.statistics.cached_tokens == len(PROMPT) - 1


@pytest.mark.parametrize("after", [1, 2, 3, 6])
def test_closing_the_iterator_early_keeps_the_cache_valid(model: Model, greedy: UncachedGreedy, after: int) -> None:
    engine = Engine(model, prefill_chunk=16)
    events = engine.generate(Request(PROMPT, max_tokens=10))
    for _ in range(after):
        next(events)
    events.close()  # pyright: ignore[reportAttributeAccessIssue]
    tokens, _ = run(engine, Request(PROMPT, max_tokens=10))
    assert tokens == greedy(PROMPT, 10)


def test_cancellation_ends_soon_and_keeps_the_cache(model: Model) -> None:
    seen: list[int] = []
    engine = Engine(model)
    end = None
    for event in engine.generate(Request(PROMPT, max_tokens=100)):
        if isinstance(event, Token):
            seen.append(event.id)
        if len(seen) == 3:
            engine.cancel(0)
        end = event
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    assert 3 <= len(seen) <= 12
    tokens, _ = run(Engine(model), Request(PROMPT, max_tokens=len(seen)))
    assert tokens == seen


def test_cancellation_during_prefill(model: Model) -> None:
    engine = Engine(model, prefill_chunk=16)
    for steps in range(3):
        engine.add(0, Request(PROMPT))
        for _ in range(steps):
            list(engine.step())
        engine.cancel(0)
        events = [event for _, event in engine.step()]
        assert isinstance(events[-1], Finished)
        assert (events[-1].reason, events[-1].statistics.generated_tokens) == ("cancelled", 0)


def test_same_seed_repeats_the_answer_and_another_seed_does_not(model: Model) -> None:
    def sample(seed: int) -> list[int]:
        return run(Engine(model), Request(PROMPT, max_tokens=16, sampling=Sampling(temperature=1.5, seed=seed)))[0]

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_top_k_of_one_is_greedy(model: Model, greedy: UncachedGreedy) -> None:
    tokens, _ = run(Engine(model), Request(PROMPT, max_tokens=8, sampling=Sampling(temperature=1.0, top_k=1, seed=3)))
    assert tokens == greedy(PROMPT, 8)


def test_max_tokens_defaults_to_the_rest_of_the_context(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    context = len(PROMPT) + 3
    monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=context))
    tokens, end = run(Engine(model), Request(PROMPT))
    assert (len(tokens), end.reason) == (3, "length")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(()), "no tokens"),
        (Request((1, -1)), "-1"),
        (Request((1, 10**9)), "outside the vocabulary"),
        (Request((1,) * 200_000), "the context holds"),
        (Request((1,), max_tokens=-1), "at least 0"),
    ],
)
def test_what_cannot_be_served_is_refused(model: Model, request_: Request, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        list(Engine(model).generate(request_))


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}])
def test_sampling_checks_its_ranges(values: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(values))):
        Sampling(**values)  # type: ignore[arg-type]


def test_requests_and_statistics_survive_json() -> None:
    request = Request((1, 2), 5, Sampling(0.5, 0.9, 3, 0.1, 7), frozenset({4}))
    assert Request.from_dict(request.to_dict()) == request
    statistics = Statistics(10, 4, 5, ttft_s=0.5, decode_s=2.0, peak_memory_bytes=1)
    assert Statistics.from_dict(statistics.to_dict()) == statistics
    assert statistics.prefill_tok_per_s == 12
    assert statistics.decode_tok_per_s == 2


def test_concurrent_requests_share_prompt_prefixes(model: Model, greedy: UncachedGreedy) -> None:
    engine = Engine(model, prefill_chunk=16)
    prompts = [(*PROMPT, 5), (*PROMPT, 6), (*PROMPT[:30], 7)]
    tokens: dict[int, list[int]] = {number: [] for number in range(3)}
    cached: dict[int, int] = {}
    for number, prompt in enumerate(prompts):
        engine.add(number, Request(prompt, max_tokens=4 + number))
        for _ in range(6):  # the next request arrives after this prompt's prefill
            _take(engine, tokens, cached)
    while not engine.is_idle:
        _take(engine, tokens, cached)
    assert tokens == {number: greedy(prompt, 4 + number) for number, prompt in enumerate(prompts)}
    assert cached == {0: 0, 1: 40, 2: 30}


def _take(engine: Engine, tokens: dict[int, list[int]], cached: dict[int, int]) -> None:
    if engine.is_idle:
        return
    for number, event in engine.step():
        if isinstance(event, Token):
            tokens[number].append(event.id)
        elif isinstance(event, Finished):
            cached[number] = event.statistics.cached_tokens


def test_numpy_ids_are_accepted_and_non_integers_rejected(model: Model, greedy: UncachedGreedy) -> None:
    tokens, _ = run(Engine(model), Request(tuple(np.array(PROMPT)), max_tokens=2))
    assert tokens == greedy(PROMPT, 2)
    for wrong in ((1.5,), ("a",)):
        with pytest.raises(UsageError, match="whole numbers"):
            Request(wrong)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="whole numbers"):
        Request((1,), max_tokens="x")  # pyright: ignore[reportArgumentType]


def test_commands_executed_while_idle_are_not_expected_again(model: Model) -> None:
    engine = Engine(model)
    assert [engine.num_new_commands(taken) for taken in range(1, 400)] == [1] * 399
    engine.add(0, Request(PROMPT, max_tokens=1))
    assert engine.num_new_commands(400) == 0


def make_prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 192, length).tolist())


def test_text_is_the_same_alone_and_in_a_batch_of_eight(model: Model) -> None:
    engine = Engine(model, prefill_chunk=16)
    prompts = [make_prompt(5 + 7 * number, seed=number) for number in range(8)]
    tokens: dict[int, list[int]] = {number: [] for number in range(8)}
    cached: dict[int, int] = {}
    for number, prompt in enumerate(prompts):
        engine.add(number, Request(prompt, max_tokens=12))
        _take(engine, tokens, cached)
    while not engine.is_idle:
        _take(engine, tokens, cached)
    alone = Engine(model)
    assert tokens == {number: run(alone, Request(prompt, max_tokens=12))[0] for number, prompt in enumerate(prompts)}


@pytest.mark.slow
def test_waiting_prompts_with_a_common_prefix_cost_little_per_step(model: Model) -> None:
    prefix = make_prompt(400, 6)
    engine = Engine(model, prefill_chunk=16)
    for number in range(17):
        engine.add(number, Request((*prefix, number), max_tokens=1))
    compared: list[int] = []
    common_prefix = TokenArray.common_prefix

    def count(self: TokenArray, other: TokenArray, start: int = 0, limit: int | None = None) -> int:
        end = common_prefix(self, other, start, limit)
        compared.append(end - start)
        return end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenArray, "common_prefix", count)
        while not engine.is_idle:
            list(engine.step())
    assert sum(compared) <= 16 * len(prefix)  # each token of each prompt once


def test_a_prompt_in_prefill_beside_a_long_draft(model: Model) -> None:
    draft, chunk = make_prompt(12, 4), make_prompt(20, 5)
    alone = model.logits(model.hidden(mx.array([draft]), [SequenceSlice(model.make_cache(), 12, 12)]))
    slices = [SequenceSlice(model.make_cache(), 12, 12), SequenceSlice(model.make_cache(), 20, 0)]
    together = model.logits(model.hidden(mx.array([draft + chunk]), slices))
    assert mx.allclose(together, alone, atol=1e-4)


def test_a_long_prompt_stalls_the_others_for_a_chunk_at_a_time(model: Model) -> None:
    engine = Engine(model, prefill_chunk=16)
    engine.add(0, Request(make_prompt(3, seed=1), max_tokens=50))
    list(engine.step())
    list(engine.step())
    engine.add(1, Request(make_prompt(160, seed=2), max_tokens=1))
    engine.add(2, Request(make_prompt(10, seed=3), max_tokens=1))
    seen: list[set[tuple[int, type]]] = []
    while not engine.is_idle:
        seen.append({(number, type(event)) for number, event in engine.step()})
    prefills = [step for step in seen if (1, Prefilled) in step]
    assert len(prefills) >= 9
    assert all((0, Token) in step for step in prefills[1:])
    ends = [next(at for at, step in enumerate(seen) if (number, Finished) in step) for number in (2, 1)]
    assert ends == sorted(ends)  # the short prompt does not wait for the long one


@pytest.mark.parametrize(("seconds", "chunk"), [(0.0, 1), (10.0, 8)])
def test_chunks_while_others_decode_fit_the_time_of_a_step(
    model: Model, greedy: UncachedGreedy, seconds: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "SHARED_STEP_S", seconds)
    engine = Engine(model, prefill_chunk=16)
    engine.add(0, Request(make_prompt(3, seed=1), max_tokens=60))
    list(engine.step())
    list(engine.step())
    engine.add(1, Request(PROMPT, max_tokens=3))
    events: list[tuple[int, object]] = []
    while not engine.is_idle:
        events += engine.step()
    done = [event.done for number, event in events if number == 1 and isinstance(event, Prefilled)]
    assert done == list(range(0, len(PROMPT) + 1, chunk))
    assert [event.id for number, event in events if number == 1 and isinstance(event, Token)] == greedy(PROMPT, 3)


@pytest.mark.slow
def test_requests_without_room_wait_or_are_preempted(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_limits, "MIN_CACHE_TOKENS", 0)
    layers, width = len(model.layers), model.config.kv_lora_rank + model.config.qk_rope_head_dim
    engine = Engine(model, cache_bytes=768 * layers * width * 4)
    prompts = [make_prompt(250, seed=number) for number in range(5)]
    tokens: dict[int, list[int]] = {number: [] for number in range(5)}
    cached: dict[int, int] = {}
    for number, prompt in enumerate(prompts):
        engine.add(number, Request(prompt, max_tokens=20))
    most = 0
    while not engine.is_idle:
        _take(engine, tokens, cached)
        most = max(most, sum(len(batch.members) for batch in engine._batches))
        assert engine._pool.busy_tokens + engine._pool.idle_tokens <= 768
    assert most == 2  # 256 tokens each at first, 512 at the end
    assert all(len(found) == 20 for found in tokens.values())
    alone = Engine(model)
    assert [run(alone, Request(prompts[number], max_tokens=20))[0] for number in (2, 4)] == [tokens[2], tokens[4]]
    with pytest.raises(EngineError, match="the KV cache holds 768"):
        engine.add(9, Request((1,) * 1024))


@pytest.mark.slow
def test_first_tokens_come_in_order_of_arrival_within_a_client(model: Model) -> None:
    prefix = make_prompt(200, 6)
    engine = Engine(model, prefill_chunk=64)
    for number in range(24):
        engine.add(number, Request((*prefix, number, *make_prompt(20, number)), max_tokens=3, client="many"))
    order: list[int] = []
    while not engine.is_idle:
        for number, event in engine.step():
            if isinstance(event, Token) and number not in order:
                order.append(number)
        if len(order) == 5 and 99 not in order:
            engine.add(99, Request(make_prompt(20, 99), max_tokens=1, client="one"))
    assert [number for number in order if number != 99] == list(range(24))
    assert order.index(99) < 24


def test_limits_of_experts_on_the_ssd_are_those_of_the_engine(model: Model) -> None:
    """One sequence at a time; chunks stay whole while others decode, because shorter ones read as many experts."""
    engine = Engine(model, streaming=StreamingLimits(chunk=16, sequences=1))
    for number in range(3):
        engine.add(number, Request(make_prompt(40, number), max_tokens=3))
    while not engine.is_idle:
        list(engine.step())
        assert engine.num_running <= 1
    engine = Engine(model, streaming=StreamingLimits(chunk=16, sequences=2))
    engine.add(0, Request(make_prompt(4, 9), max_tokens=20))
    list(engine.step())
    engine.add(1, Request(make_prompt(40, 8), max_tokens=1))
    events = [pair for _ in range(6) for pair in engine.step()]
    done = [event.done for request_id, event in events if request_id == 1 and isinstance(event, Prefilled)]
    assert done == [0, 16, 32, 40]


def engine_with_places(model: Model, max_sequences: int) -> Engine:
    model.tune(replace(model.tuning, max_sequences=max_sequences))
    try:
        return Engine(model)
    finally:
        model.tune(CPU_TUNING)


def test_the_number_of_running_sequences_is_limited_by_device_and_counted(model: Model) -> None:
    engine = engine_with_places(model, 3)
    for number in range(5):
        engine.add(number, Request(make_prompt(10, number), max_tokens=4))
    most = 0
    while not engine.is_idle:
        list(engine.step())
        most = max(most, engine.num_running)
    assert most == 3
    steps = engine.batch_sizes.to_dict()
    assert steps["3-4"] > 0
    assert sum(engine.batch_sizes.counts) * 3 >= engine.batch_sizes.total > sum(engine.batch_sizes.counts)


@pytest.mark.slow
def test_a_client_with_many_sequences_leaves_places_for_others(model: Model) -> None:
    engine = engine_with_places(model, 16)
    for number in range(20):
        engine.add(number, Request(make_prompt(4, number), max_tokens=40, client="many"))
    for _ in range(4):
        list(engine.step())
    assert engine.num_running == 15
    engine.add(20, Request(make_prompt(4, 20), max_tokens=2, client="one"))
    events = [pair for _ in range(8) for pair in engine.step()]
    ended = [request_id for request_id, event in events if isinstance(event, Finished)]
    assert ended == [20]
    while not engine.is_idle:
        list(engine.step())
