"""Caches that are rows of a stack behave like separate ones."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model import attention
from kimi_mlx.model.cache import STEP, KeyStack, LatentCache, append_together, fetch_together
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device_traits import METAL_TUNING
from kimi_mlx.weights.assemble import load_model

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"
WIDTH = 3


def rows_of(cache: LatentCache) -> list[list[float]]:
    return np.array(cache.fetch(cache.offset)[0, 0]).tolist()


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_joint_and_separate_appends_keeps_the_rows(seed: int) -> None:
    choose = random.Random(seed)
    caches = [LatentCache() for _ in range(5)]
    expected: list[list[list[float]]] = [[] for _ in caches]
    for step in range(40):
        members = choose.sample(range(5), choose.randint(1, 5))
        if choose.random() < 0.4 and step:
            members = sorted(members)
        length = choose.choice([1, 1, 2, 90])
        new = mx.random.normal((len(members), length, WIDTH), key=mx.random.key(100 * seed + step))
        chosen = [caches[member] for member in members]
        if len(members) > 1:
            positions = mx.array([[cache.offset + i for i in range(length)] for cache in chosen])
            append_together(chosen, new, (mx.arange(len(members))[:, None], positions))
        else:
            chosen[0].append(new[:, None])
        for member, part in zip(members, np.array(new).tolist(), strict=True):
            expected[member] += part
        if choose.random() < 0.3:
            cut = caches[members[0]].trim(choose.randint(0, 3))
            del expected[members[0]][len(expected[members[0]]) - cut :]
        together = fetch_together(chosen, max(cache.offset for cache in chosen))
        for row, member in enumerate(members):
            assert together[row, 0, : len(expected[member])].tolist() == expected[member]
    assert [rows_of(cache) for cache in caches] == expected


def test_a_cache_that_leaves_takes_only_its_own_row() -> None:
    caches = [LatentCache() for _ in range(4)]
    for cache in caches:
        cache.append(mx.ones((1, 1, 10, WIDTH)))
    stack = KeyStack(caches, STEP)
    assert stack.holds(caches)
    assert not stack.holds(caches[:3])
    KeyStack(caches[1:3], STEP)
    assert caches[0].stack is None  # a member that was left behind no longer keeps the stack
    assert caches[3].stack is None
    assert caches[0].state[0].nbytes == STEP * WIDTH * 4
    del stack, caches[3]
    gc.collect()
    copy = LatentCache()
    copy.copy(caches[1], 5)
    copy.append(mx.zeros((1, 1, 1, WIDTH)))
    assert rows_of(copy) == [[1.0] * WIDTH] * 5 + [[0.0] * WIDTH]
    assert rows_of(caches[1]) == [[1.0] * WIDTH] * 10


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


@pytest.mark.parametrize("new", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_stacked_sequences_have_the_states_of_single_ones(
    model: Model, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "uses_numpy", lambda *args: False)
    lengths = [20, 24, 60, 130]
    tokens = [mx.random.randint(0, 1_000, (1, length + 6 * new), key=mx.random.key(length)) for length in lengths]
    alone, together = [model.make_cache() for _ in lengths], [model.make_cache() for _ in lengths]
    for row, length, *caches in zip(tokens, lengths, alone, together, strict=True):
        for cache in caches:
            mx.eval(model(row[:, :length], cache))
    tuning = model.tuning
    for step in range(6):
        active = [0, 1, 2, 3] if step != 3 else [1, 2, 3]  # one is left out for a step
        parts = [tokens[i][:, alone[i][0].offset : alone[i][0].offset + new] for i in active]
        expected = [
            model.hidden(part, [SequenceSlice(alone[i], new, new)]) for part, i in zip(parts, active, strict=True)
        ]
        model.tune(METAL_TUNING)
        got = model.hidden(mx.concatenate(parts, axis=1), [SequenceSlice(together[i], new, new) for i in active])
        model.tune(tuning)
        np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(expected, axis=1)), rtol=1e-3, atol=1e-3)
    assert together[0][0].stack is not None
    assert together[0][0].stack is together[1][0].stack
