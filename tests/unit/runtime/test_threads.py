"""A model that was loaded in one thread is used in others: MLX's streams belong to threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import mlx.core as mx
import pytest

import kimi_mlx
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.events import Token
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sampling import Sampling
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.load import fingerprint, load_share
from kimi_mlx.runtime.prompt_cache import open_prompt_cache
from tests.divisible import make_prompt, write_divisible

Result = TypeVar("Result")
PROMPT = make_prompt(300, 1)


def in_thread(function: Callable[[], Result]) -> Result:
    """Run a function in a new thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def generate(model: Model, prompt: tuple[int, ...] = PROMPT, **sampling: float) -> list[int]:
    """Generate with an engine of this thread."""
    request = Request(prompt, max_tokens=4, sampling=Sampling(**sampling, seed=3))  # pyright: ignore[reportArgumentType]
    return [event.id for event in Engine(model).generate(request) if isinstance(event, Token)]


def test_a_model_of_one_thread_is_used_in_ten_others() -> None:
    model, tokenizer = in_thread(lambda: kimi_mlx.load("kimi-mini"))
    prompt = tuple(tokenizer.apply_chat_template([{"role": "user", "content": "Who are you?"}]))
    results: dict[int, list[int]] = {}
    threads = [
        threading.Thread(target=lambda at=at: results.update({at: generate(model, prompt, temperature=0.7)}))
        for at in range(10)
    ]
    for thread in threads:
        thread.start()
        thread.join(60)
    assert len(results) == 10
    assert {tuple(ids) for ids in results.values()} == {tuple(generate(model, prompt, temperature=0.7))}


def test_a_cache_of_one_thread_continues_in_others(tmp_path: Path) -> None:
    folder = write_divisible(tmp_path, "k2", layers=3)
    config = load_config(folder)
    model = in_thread(lambda: load_share(folder, config, "float32"))
    tokens = mx.array([PROMPT[:20]])
    expected = model(tokens)[0, -1]

    def extend(cache: list[LatentCache], part: mx.array) -> mx.array:
        logits = model(part, cache)[0, -1]
        mx.eval(logits)
        return logits

    cache = model.make_cache()
    logits = [in_thread(lambda at=at: extend(cache, tokens[:, at : at + 2])) for at in range(0, 20, 2)]
    assert mx.allclose(logits[-1], expected, atol=1e-4)


def test_restored_blocks_are_evaluated_before_another_thread_uses_them(tmp_path: Path) -> None:
    folder = write_divisible(tmp_path, "k2", layers=3)
    config = load_config(folder)
    model = load_share(folder, config, "float32")
    answers: list[list[int]] = []

    def answer() -> int:
        blocks = open_prompt_cache(tmp_path / "cache", 10**9, model, fingerprint(folder, config))
        engine = Engine(model, blocks=blocks)
        events = list(engine.generate(Request(PROMPT, max_tokens=4)))
        blocks.close()
        answers.append([event.id for event in events if isinstance(event, Token)])
        return events[-1].statistics.cached_tokens  # pyright: ignore[reportAttributeAccessIssue]

    assert [in_thread(answer) for _ in range(3)] == [0, 256, 256]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_an_engine_continues_in_another_thread_with_restored_caches(tmp_path: Path) -> None:
    folder = write_divisible(tmp_path, "k2", layers=3)
    config = load_config(folder)
    model = in_thread(lambda: load_share(folder, config, "float32"))
    engine = in_thread(lambda: Engine(model))

    def answer() -> list[int]:
        return [event.id for event in engine.generate(Request(PROMPT, max_tokens=4)) if isinstance(event, Token)]

    first = in_thread(answer)
    assert [in_thread(answer) for _ in range(9)] == [first] * 9
