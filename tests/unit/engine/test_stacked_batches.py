"""Batches whose caches are stacked, as on a GPU, give the tokens of separate ones; idle caches leave the stack."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.model import attention
from kimi_mlx.model.cache import KeyStack
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.device_traits import METAL_TUNING
from kimi_mlx.weights.assemble import load_model

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


def answers(engine: Engine, requests: list[Request]) -> dict[int, list[int]]:
    """Return the tokens of each request; one more starts in every step."""
    tokens: dict[int, list[int]] = {}
    waiting = list(enumerate(requests))
    while waiting or not engine.is_idle:
        if waiting:
            engine.add(*waiting.pop(0))
        for number, event in engine.step():
            if isinstance(event, Token):
                tokens.setdefault(number, []).append(event.id)
    return tokens


@pytest.mark.slow
def test_stacked_batches_give_the_same_tokens(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    prompts = [tuple(random.integers(0, 1_500, 30 + 9 * number).tolist()) for number in range(5)]
    requests = [Request(prompt, max_tokens=4 + 3 * number) for number, prompt in enumerate(prompts)]
    expected = answers(Engine(model, prefill_chunk=64), requests)
    tuning = model.tuning
    stacks: list[int] = []
    monkeypatch.setattr(attention, "uses_numpy", lambda *args: False)
    original = KeyStack.__init__
    monkeypatch.setattr(KeyStack, "__init__", lambda self, *args: (stacks.append(1), original(self, *args))[1])
    model.tune(METAL_TUNING)
    try:
        engine = Engine(model, prefill_chunk=64)
        assert answers(engine, requests) == expected
        assert len(stacks) >= 4 * len(model.layers)  # the batch has changed as often
        continued = [Request((*prompt, *expected[number], 7), max_tokens=3) for number, prompt in enumerate(prompts)]
        repeated = answers(engine, continued)  # from the pool
    finally:
        model.tune(tuning)
    assert all(layer.stack is None for cache in engine._pool._idle for layer in cache.layers)
    monkeypatch.undo()
    assert repeated == answers(Engine(model, prefill_chunk=64), continued)
