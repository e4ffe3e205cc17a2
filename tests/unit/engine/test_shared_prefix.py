"""Prefixes whose rows several caches share: contents, memory, agreement of ranks, and text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.fair_queue import FairQueue
from kimi_mlx.engine.kv_cache_pool import KVCachePool, SequenceCache, common_prefix, padded_length
from kimi_mlx.engine.request import Request, Sampling
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.shared_prefix import MIN_SHARED_TOKENS, SHARED_STEP, length_to_share
from kimi_mlx.model.cache import LatentCache, SharedRows
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.device_traits import CPU_TUNING, METAL_TUNING
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.load import load
from tests.examples import examples
from tests.unit.engine.cache_rows import MODEL, append_tokens, check, run_turn
from tests.unit.engine.test_kv_cache_pool import make_tokens

SYSTEM = make_tokens(1169, 1)


def arrays_of(caches: Iterable[SequenceCache]) -> dict[int, mx.array]:
    """Return the different arrays of rows of some caches, by identity."""
    rows = [layer.keys for cache in caches for layer in cache.layers if layer.keys is not None]
    shared = {id(layer.shared): layer.shared for cache in caches for layer in cache.layers if layer.shared is not None}
    return {id(array): array for array in (*rows, *(part.keys for part in shared.values()))}


def test_a_hundred_sequences_hold_their_common_prefix_once() -> None:
    pool = KVCachePool(MODEL, 100_000)
    caches = []
    for number in range(100):
        prompt = [*SYSTEM, *make_tokens(40, 10 + number)]
        assert pool.has_room(prompt, 20)
        cache, cached = pool.acquire(prompt)
        assert cached == (len(SYSTEM) if number else 0)
        append_tokens(cache, prompt[cached:])
        caches.append(cache)
    for cache in caches:
        check(cache)
    length = len(SYSTEM) - len(SYSTEM) % SHARED_STEP
    assert pool.busy_tokens == length + 100 * padded_length(len(SYSTEM) + 40 - length)
    num_bytes = sum(array.nbytes for array in arrays_of(caches).values())
    assert num_bytes == pool.busy_tokens * 4 * 3 * 2  # float32, width and layers of MODEL
    assert len({id(cache.prefix) for cache in caches}) == 1
    for cache in caches:
        pool.release(cache)
    assert pool.idle_tokens == length + 100 * padded_length(len(SYSTEM) + 40 - length)
    assert run_turn(pool, [*SYSTEM, *make_tokens(40, 10), 7]) == len(SYSTEM) + 40
    pool.clear()
    assert pool.idle_tokens == 0


def test_room_for_sequences_that_share() -> None:
    pool = KVCachePool(MODEL, 2 * 1280 + 256)
    prompts = [[*SYSTEM, *make_tokens(40, 10 + number)] for number in range(8)]
    for prompt in prompts:
        assert pool.has_room(prompt)
        cache, cached = pool.acquire(prompt)
        append_tokens(cache, prompt[cached:])
        assert pool.busy_tokens <= pool.budget_tokens
        if pool.busy_tokens + 256 > pool.budget_tokens:
            break
    assert len(pool._busy) == 6  # of which only two would fit without sharing
    assert not pool.has_room(prompts[7])
    assert not pool.has_room(make_tokens(200, 3))


def test_a_cache_that_loses_a_part_of_its_prefix_has_rows_of_its_own() -> None:
    pool = KVCachePool(MODEL, 10_000)
    caches = []
    for number in range(2):
        prompt = [*SYSTEM, *make_tokens(40, 10 + number)]
        cache, cached = pool.acquire(prompt)
        append_tokens(cache, prompt[cached:])
        caches.append(cache)
    caches[0].truncate(700)
    assert (caches[0].prefix, caches[0].num_shared) == (None, 0)
    append_tokens(caches[0], make_tokens(10, 9))
    for cache in caches:
        check(cache)
        pool.release(cache)
    for cache in pool._idle:
        check(cache)


def test_a_sequence_that_runs_alone_has_rows_of_its_own() -> None:
    pool = KVCachePool(MODEL, 100_000)
    prompts = [[*SYSTEM, *make_tokens(40, 10 + number)] for number in range(3)]
    caches = [pool.acquire(prompt)[0] for prompt in prompts[:1]]
    append_tokens(caches[0], prompts[0])
    caches.append(pool.acquire(prompts[1])[0])
    append_tokens(caches[1], prompts[1][len(SYSTEM) :])
    prefix = caches[0].prefix
    assert prefix is not None
    for cache in caches:
        pool.release(cache)
    alone, cached = pool.acquire([*prompts[0], 7])  # continued in place
    assert (alone, cached, alone.prefix) == (caches[0], len(prompts[0]), None)
    append_tokens(alone, [7])
    other, _ = pool.acquire(prompts[2])
    assert other.prefix is alone.prefix is prefix  # which the idle cache still has
    for cache in (*caches, other):
        check(cache)


def test_a_partner_with_a_longer_prefix_keeps_it() -> None:
    pool = KVCachePool(MODEL, 100_000)
    history = make_tokens(3000, 2)
    caches: list[SequenceCache] = []
    for tail in ([*history, 1], [*history, 2], [1], [2], [3]):
        cache, cached = pool.acquire([*SYSTEM, *tail, 7])
        append_tokens(cache, [*SYSTEM, *tail, 7][cached:])
        caches.append(cache)
    for cache in caches:
        check(cache)
    assert [cache.num_shared for cache in caches] == [4160, 4160, 1152, 1152, 1152]


def test_a_much_longer_common_prefix_replaces_a_short_one() -> None:
    pool = KVCachePool(MODEL, 100_000)
    history = make_tokens(3000, 2)
    caches: list[SequenceCache] = []
    for tail in ([1], [2], [*history, 1], [*history, 2], [*history, 3], [3]):
        cache, cached = pool.acquire([*SYSTEM, *tail, 7])
        append_tokens(cache, [*SYSTEM, *tail, 7][cached:])
        caches.append(cache)
    for cache in caches:
        check(cache)
    lengths = [cache.num_shared for cache in caches]
    assert lengths == [1152, 1152, *[4160] * 3, 1152]


@pytest.mark.parametrize(("common", "existing"), [(0, 0), (511, 0), (1700, 600), (700, 512)])
def test_prefixes_not_worth_sharing(common: int, existing: int) -> None:
    assert length_to_share(common, existing) == 0


@given(common=st.integers(0, 10_000), existing=st.integers(0, 2000))
def test_sharing_never_takes_more_memory_than_a_copy(common: int, existing: int) -> None:
    length = length_to_share(common, existing)
    if not length:
        return
    assert length <= common
    assert length >= MIN_SHARED_TOKENS
    for own in (1, 255, 256, 257):
        total = length + own
        copies = 2 * padded_length(total - existing)
        assert length + 2 * padded_length(own) <= copies


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 300), st.integers(0, 3), st.booleans()), max_size=25
)


@examples(20)
@given(steps=STEPS, budget=st.integers(6, 24))
def test_the_budget_is_kept_and_ranks_agree_with_shared_prefixes(
    steps: list[tuple[int, int, int, int, bool]], budget: int
) -> None:
    pools = [KVCachePool(MODEL, budget * 256) for _ in range(2)]
    busy: list[list[SequenceCache]] = []
    for number, (system, history, tail, action, is_computed) in enumerate(steps):
        prompt = [*make_tokens(600 * system, system), *make_tokens(700 * history, 5 + history)]
        prompt += [*make_tokens(tail, 100 + number), 9]
        rooms = {pool.has_room(prompt, 50) for pool in pools}
        assert len(rooms) == 1
        if rooms == {True}:
            kept = [*pools[0]._idle, *(cache for cache, _ in pools[0]._busy)]
            expected = max((common_prefix(cache.tokens, prompt[:-1]) for cache in kept), default=0)
            caches = []
            for pool in pools:
                cache, cached = pool.acquire(prompt)
                assert cached == expected
                check(cache)
                assert pool.busy_tokens + pool.idle_tokens <= pool.budget_tokens
                if is_computed:
                    append_tokens(cache, prompt[cached:])
                caches.append(cache)
            busy.append(caches)
        if busy and action:
            for pool, cache in zip(pools, busy.pop(action % len(busy)), strict=True):
                pool.release(cache)
                assert pool.busy_tokens + pool.idle_tokens <= pool.budget_tokens
        assert pools[0].busy_tokens == pools[1].busy_tokens
        assert pools[0].idle_tokens == pools[1].idle_tokens
    for cache in (*pools[0]._idle, *(caches[0] for caches in busy)):
        check(cache)


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """Run all requests at the same time; return their tokens."""
    tokens: list[list[int]] = [[] for _ in requests]
    for number, request in enumerate(requests):
        engine.add(number, request)
    while not engine.is_idle:
        for number, event in engine.step():
            assert not isinstance(event, Exception)
            if isinstance(event, Token):
                tokens[number].append(event.id)
            if isinstance(event, Finished):
                assert event.statistics.generated_tokens == len(tokens[number])
    return tokens


@pytest.fixture(scope="module")
def model_and_text() -> tuple[Model, ChatTokenizer]:
    return load("kimi-mini")


@pytest.fixture(scope="module")
def requests(model_and_text: tuple[Model, ChatTokenizer]) -> list[Request]:
    text = model_and_text[1]
    system = text.encode("You answer in one word, and you never ask back. " * 12)[:140]
    return [
        Request(
            (*system, *text.encode(f"Question {number}: what is the capital of France?")),
            8 + number % 5,
            Sampling(temperature=0.8, seed=number) if number % 3 == 0 else Sampling(),
            client=str(number % 2),
        )
        for number in range(8)
    ]


@pytest.fixture(scope="module")
def alone(model_and_text: tuple[Model, ChatTokenizer], requests: list[Request]) -> list[list[int]]:
    """Return the answers of an engine that gets one request at a time."""
    return [answers(Engine(model_and_text[0]), [request])[0] for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("is_like_gpu", [False, True])
@pytest.mark.parametrize(
    ("cache_tokens", "speculate"),
    [(None, 0), (400, 3), *(pytest.param(*case, marks=pytest.mark.sweep) for case in ((400, 0), (None, 3)))],
)
def test_answers_with_a_shared_prefix_equal_those_alone(
    model_and_text: tuple[Model, ChatTokenizer],
    requests: list[Request],
    alone: list[list[int]],
    cache_tokens: int | None,
    speculate: int,
    is_like_gpu: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_and_text[0]
    monkeypatch.setattr(model, "tuning", METAL_TUNING if is_like_gpu else CPU_TUNING)
    monkeypatch.setattr(model, "attention_cost", replace(model.attention_cost, tuning=model.tuning))
    monkeypatch.setattr("kimi_mlx.model.attention.uses_numpy", lambda *args: not is_like_gpu)
    monkeypatch.setattr("kimi_mlx.sizing.engine_limits.MIN_CACHE_TOKENS", 256)
    monkeypatch.setattr("kimi_mlx.engine.shared_prefix.MIN_SHARED_TOKENS", 64)
    monkeypatch.setattr("kimi_mlx.engine.engine.RESERVED_TOKENS", 1)
    monkeypatch.setattr(LatentCache, "step", 8)  # so that caches grow often, and sequences are preempted
    preempted: list[Sequence] = []
    put_back = FairQueue.put_back
    monkeypatch.setattr(
        FairQueue, "put_back", lambda queue, sequence: (preempted.append(sequence), put_back(queue, sequence))
    )
    token_bytes = 4 * len(model.layers) * (model.config.kv_lora_rank + model.config.qk_rope_head_dim)
    engine = Engine(model, cache_bytes=cache_tokens and cache_tokens * token_bytes, speculate=speculate)
    shared: set[SharedRows] = set()
    acquire = KVCachePool.acquire

    def watch(pool: KVCachePool, prompt: list[int], max_cached: int) -> tuple[SequenceCache, int]:
        cache, cached = acquire(pool, prompt, max_cached)
        shared.update(layer.shared for layer in cache.layers if layer.shared is not None)
        return cache, cached

    monkeypatch.setattr(KVCachePool, "acquire", watch)
    assert answers(engine, requests) == alone
    assert len(shared) == len(model.layers)
    assert bool(preempted) == (cache_tokens is not None)


def test_rows_of_a_cache_with_a_prefix() -> None:
    pool = KVCachePool(MODEL, 10_000)
    caches = [pool.acquire([*SYSTEM, number, 7])[0] for number in range(1)]
    append_tokens(caches[0], [*SYSTEM, 0, 7])
    second, cached = pool.acquire([*SYSTEM, 1, 7])
    append_tokens(second, [*SYSTEM, 1, 7][cached:])
    whole = np.array(second.rows(0, len(second.tokens)))
    for start, stop in ((0, 10), (1100, 1152), (1100, 1170), (1152, 1171), (1160, 1171)):
        assert np.array_equal(np.array(second.rows(start, stop)), whole[:, start:stop])
