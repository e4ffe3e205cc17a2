"""The pool of KV caches: eviction, and the prefix that a prompt reuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.kv_cache_pool import KVCachePool, SequenceCache, common_prefix, padded_length
from kimi_mlx.engine.request import Request
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.load import load
from kimi_mlx.text.template import ChatTemplate
from tests.fakes import KIMI_MINI
from tests.unit.engine.cache_rows import MODEL, append_tokens, check, run_turn

K2_THINKING = Path(__file__).parents[1] / "text" / "templates" / "k2_thinking.jinja"


def make_tokens(count: int, seed: int) -> list[int]:
    """Return tokens that no other seed returns."""
    return [seed * 10_000 + at for at in range(count)]


SYSTEM = make_tokens(900, 1)


def test_next_turn_reuses_the_whole_conversation() -> None:
    pool, prompt, cached = KVCachePool(MODEL, 10_000), list(SYSTEM), []
    for number in range(10):
        prompt += make_tokens(50, 10 + number)
        cached.append(run_turn(pool, prompt, answer := make_tokens(30, 50 + number)))
        prompt += answer
    assert cached == [0, *(len(SYSTEM) + 80 * number for number in range(1, 10))]
    assert pool.idle_tokens == padded_length(len(prompt))  # one sequence, not ten


def test_conversations_with_a_common_prefix_do_not_truncate_each_other() -> None:
    pool = KVCachePool(MODEL, 10_000)
    prompts = {agent: [*SYSTEM, *make_tokens(100, 10 + agent)] for agent in range(3)}
    for round_ in range(4):
        for agent, prompt in prompts.items():
            cached = run_turn(pool, prompt, answer := make_tokens(40, 100 + 10 * round_ + agent))
            expected = len(prompt) - 100 if round_ else len(SYSTEM) * bool(agent)
            assert cached == expected
            prompt += [*answer, *make_tokens(100, 200 + 10 * round_ + agent)]


def test_stripped_thinking_recomputes_one_turn_and_leaves_no_stale_cache() -> None:
    pool = KVCachePool(MODEL, 10_000)
    question, thinking, answer = make_tokens(200, 2), make_tokens(300, 3), make_tokens(60, 4)
    assert run_turn(pool, [*SYSTEM, *question], [*thinking, *answer]) == 0
    assert run_turn(pool, [*SYSTEM, *question, *answer, *make_tokens(20, 5)]) == len(SYSTEM) + len(question)
    assert pool.idle_tokens == padded_length(len([*SYSTEM, *question, *answer, *make_tokens(20, 5)]))


def test_second_answer_to_a_prompt_keeps_the_first_cached() -> None:
    pool = KVCachePool(MODEL, 10_000)
    assert [run_turn(pool, SYSTEM, make_tokens(300, answer)) for answer in (2, 3)] == [0, len(SYSTEM) - 1]
    assert [run_turn(pool, [*SYSTEM, *make_tokens(300, answer), 7]) for answer in (2, 3)] == [len(SYSTEM) + 300] * 2


def test_least_recently_used_cache_is_evicted() -> None:
    pool = KVCachePool(MODEL, 3 * 512)
    for seed in (1, 2, 3):
        run_turn(pool, make_tokens(400, seed))
    run_turn(pool, make_tokens(400, 1))  # now 2 is the oldest
    run_turn(pool, make_tokens(400, 4))
    assert pool.idle_tokens == 3 * 512
    assert [run_turn(pool, make_tokens(400, seed)) for seed in (4, 3, 1)] == [399] * 3
    assert run_turn(pool, make_tokens(400, 2)) == 0


def test_sequence_is_truncated_in_place_if_a_copy_does_not_fit() -> None:
    pool = KVCachePool(MODEL, 2048)
    run_turn(pool, [*SYSTEM, *make_tokens(600, 2)])
    assert run_turn(pool, [*SYSTEM, *make_tokens(600, 3)]) == len(SYSTEM)
    assert pool.idle_tokens == padded_length(1500)
    assert run_turn(pool, [*SYSTEM, *make_tokens(600, 2)]) == len(SYSTEM)


def test_a_sequence_in_use_is_copied() -> None:
    pool = KVCachePool(MODEL, 10_000)
    first, _ = pool.acquire(tuple(SYSTEM))
    append_tokens(first, SYSTEM[:500])
    second, cached = pool.acquire((*SYSTEM[:450], 1, 2))
    assert (cached, second is first) == (450, False)
    append_tokens(first, SYSTEM[500:])
    append_tokens(second, [1, 2])
    for cache in (first, second):
        check(cache)
    assert pool.busy_tokens == 1024 + 512
    assert pool.idle_tokens == 0


def test_prefixes_of_a_longer_sequence_are_dropped() -> None:
    pool = KVCachePool(MODEL, 10_000)
    caches = [pool.acquire(tuple(SYSTEM))[0] for _ in range(3)]
    for cache, length in zip(caches, (300, 900, 600), strict=True):
        append_tokens(cache, SYSTEM[:length])
        pool.release(cache)
    assert pool.idle_tokens == 1024


def test_make_room_evicts_only_idle_caches_and_only_if_that_is_enough() -> None:
    pool = KVCachePool(MODEL, 2048)
    run_turn(pool, make_tokens(500, 1))
    run_turn(pool, make_tokens(500, 2))
    busy, _ = pool.acquire(tuple(make_tokens(700, 3)))
    assert (pool.busy_tokens, pool.idle_tokens) == (768, 1024)
    assert not pool.make_room(1536)
    assert pool.idle_tokens == 1024
    assert pool.make_room(512)
    assert pool.idle_tokens == 512
    assert pool.has_room([0] * 1280)
    assert not pool.has_room([0] * 1280, 1)
    pool.clear()
    assert (pool.busy_tokens, pool.idle_tokens) == (768, 0)
    append_tokens(busy, make_tokens(700, 3))
    pool.release(busy)
    assert run_turn(pool, make_tokens(700, 3)) == 699


def test_memory_that_a_cancelled_prompt_does_not_need_is_freed() -> None:
    pool = KVCachePool(MODEL, 4096)
    run_turn(pool, make_tokens(300, 1))
    cache, cached = pool.acquire((*make_tokens(300, 1), *make_tokens(3000, 2)))
    assert cached == 300
    assert cache.layers[0].state[0].shape[2] == padded_length(3300)
    pool.release(cache)
    assert cache.layers[0].state[0].shape[2] == pool.idle_tokens == 512


TOKENS = st.lists(st.integers(0, 1), max_size=6)
STRETCH = 100
"""Repetitions of each random token, so that a few of them fill blocks."""


@given(
    turns=st.lists(st.tuples(TOKENS, TOKENS, st.integers(0, 3), st.booleans()), min_size=1, max_size=12),
    budget=st.integers(1, 8),
)
def test_the_budget_is_kept_and_ranks_agree(turns: list[tuple[list[int], list[int], int, bool]], budget: int) -> None:
    pools = [KVCachePool(MODEL, budget * 256) for _ in range(2)]
    busy: list[tuple[list[SequenceCache], list[int]]] = []

    def release(at: int) -> None:
        caches, rest = busy.pop(at)
        for pool, cache in zip(pools, caches, strict=True):
            growth = padded_length(len(cache.tokens) + len(rest)) - padded_length(max(len(cache.tokens), 1))
            if pool.make_room(growth):
                append_tokens(cache, rest)
            pool.release(cache)
            assert pool.busy_tokens + pool.idle_tokens <= pool.budget_tokens

    for prompt, answer, number, is_read in turns:
        prompt = [token for drawn in prompt for token in [drawn] * STRETCH] + [9]
        if pools[0].has_room(prompt):
            kept = [*pools[0]._idle, *(cache for cache, _ in pools[0]._busy)]
            expected = max((common_prefix(cache.tokens, prompt[:-1]) for cache in kept), default=0)
            taken = [pool.acquire(prompt) for pool in pools]
            assert [cached for _, cached in taken] == [expected] * 2
            for pool, (cache, cached) in zip(pools, taken, strict=True):
                check(cache)
                assert pool.busy_tokens + pool.idle_tokens <= pool.budget_tokens
                if is_read:
                    append_tokens(cache, prompt[cached:])
            busy.append(([cache for cache, _ in taken], [token for drawn in answer for token in [drawn] * 20]))
        if busy and number:
            release(number % len(busy))
    while busy:
        release(0)
    assert pools[0].idle_tokens == pools[1].idle_tokens
    for pool in pools:
        for cache in pool._idle:
            check(cache)


@given(a=TOKENS, b=TOKENS, stretch=st.sampled_from([1, 400]))
def test_common_prefix_equals_token_by_token_comparison(a: list[int], b: list[int], stretch: int) -> None:
    a, b = ([token for token in tokens for _ in range(stretch)] for tokens in (a, b))
    expected = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert common_prefix(a, b) == expected


def ask(engine: Engine, prompt: Sequence[int], max_tokens: int = 12) -> tuple[list[int], int]:
    """Return the new tokens and the number of cached prompt tokens."""
    events = list(engine.generate(Request(tuple(prompt), max_tokens)))
    end = events[-1]
    assert isinstance(end, Finished)
    return [event.id for event in events if isinstance(event, Token)], end.statistics.cached_tokens


def test_template_that_strips_thinking_recomputes_only_the_last_exchange() -> None:
    tokenizer = ChatTokenizer.load(KIMI_MINI).tokenizer
    template, pool = ChatTemplate(K2_THINKING.read_text()), KVCachePool(MODEL, 10_000)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You know the tides. " * 20}]
    asked = 0
    for exchange in range(3):
        messages.append({"role": "user", "content": f"High water today, and on day {exchange}?"})
        prompt = template.encode(tokenizer, messages)
        expected = asked + 1 if exchange else 0  # up to <think>, which is there with thinking and without
        asked = len(prompt)
        for number in (2 * exchange, 2 * exchange + 1):
            messages.append(tool_call(number))
            spoken = template.encode(tokenizer, messages, add_generation_prompt=False)
            assert run_turn(pool, prompt, spoken[len(prompt) : -1]) == expected  # <|im_end|> is not computed
            expected = len(spoken) - 1
            messages.append({"role": "tool", "tool_call_id": f"functions.tide:{number}", "content": "06:12"})
            prompt = template.encode(tokenizer, messages)
        think, end = (tokenizer.special_tokens[name] for name in ("<think>", "</think>"))
        answer = "At six in the morning, as on every day before, give or take."
        spoken = [think, *tokenizer.encode("So it is. " * 40), end, *tokenizer.encode(answer)]
        assert run_turn(pool, prompt, spoken) == expected
        messages.append({"role": "assistant", "content": answer})
        assert pool.idle_tokens == padded_length(len(prompt) + len(spoken))  # no stale sequence


def tool_call(number: int) -> dict[str, Any]:
    """Return an answer with reasoning and a tool call."""
    function = {"name": "tide", "arguments": f'{{"port": "Brest {number}"}}'}
    return {
        "role": "assistant",
        "content": "",
        "reasoning_content": f"I look it up, port {number}. " * 4,
        "tool_calls": [{"id": f"functions.tide:{number}", "type": "function", "function": function}],
    }


@pytest.mark.parametrize("is_copied", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_text_is_the_same_with_and_without_the_cache(is_copied: bool) -> None:
    model, text = load("kimi-mini")
    engine = Engine(model)
    system, question = text.encode("You answer in one word. " * 30), text.encode("What is the capital of France?")
    answer, _ = ask(engine, [*system, *question], 16)
    prompt = [*system, *(() if is_copied else (*question, *answer)), *text.encode("Which colour has the sky?")]
    tokens, cached = ask(engine, prompt, 12)
    assert cached >= len(system) + (0 if is_copied else len(question) + len(answer) - 1)
    assert tokens == ask(Engine(model), prompt, 12)[0]
