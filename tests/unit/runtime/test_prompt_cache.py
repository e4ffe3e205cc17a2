"""The prompt cache on disk with a real model: equal answers, and changed weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Finished, Token
from kimi_mlx.engine.kv_cache_pool import shape_of
from kimi_mlx.engine.request import Request
from kimi_mlx.model.config import load_config
from kimi_mlx.runtime.load import fingerprint, load
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from tests.fakes import KIMI_MINI

LIMIT = 10**9


def ask(engine: Engine, prompt: list[int]) -> tuple[list[int], int]:
    """Return the new tokens and the number of cached prompt tokens."""
    events = list(engine.generate(Request(tuple(prompt), 8)))
    end = events[-1]
    assert isinstance(end, Finished)
    return [event.id for event in events if isinstance(event, Token)], end.statistics.cached_tokens


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.sweep)])
def test_a_restart_gives_the_same_answer_from_the_cache(tmp_path: Path, dtype: str) -> None:
    model, tokenizer = load("kimi-mini", dtype)
    prompt = tokenizer.encode("A boat, a tide, a harbour and a bell. " * 40)[:300]
    identity = fingerprint(KIMI_MINI, load_config(KIMI_MINI))
    expected, cached = ask(Engine(model), prompt)
    assert cached == 0
    answers = []
    for _ in range(2):
        store = open_prompt_cache(tmp_path, LIMIT, model, identity, warn=pytest.fail)
        answers.append(ask(Engine(model, blocks=store), prompt))
        assert shape_of(model) == store.shape
        store.close()
    assert answers == [(expected, 0), (expected, 256)]


def test_rewritten_weights_have_another_fingerprint(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(KIMI_MINI, tmp_path / "model"))
    config = load_config(folder)
    before = fingerprint(folder, config)
    assert fingerprint(folder, config) == before
    os.utime(folder / "model.safetensors", (0, 0))
    after = fingerprint(folder, config)
    assert (after.shared, after.local == before.local) == (before.shared, False)
    for strategy in ("pipeline", "pipeline:3:1"):
        shares = [fingerprint(folder, config, rank, 2, strategy) for rank in range(2)]
        assert shares[0] == shares[1]
        assert shares[0].shared != before.shared
