"""The prefill chunk, and the memory that decides it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from kimi_mlx.engine.chunking import (
    MAX_CHUNK,
    MIN_CHUNK,
    PREFILL_CHUNK,
    Holding,
    attention_bytes,
    choose_chunk,
    prefill_bytes,
)
from kimi_mlx.engine.engine import Engine
from kimi_mlx.engine.free_memory import Limits, agreed_limits, free_bytes, holding_of
from kimi_mlx.engine.request import Finished, Request
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, Part
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.weights.assemble import load_model

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"
K2 = replace(
    load_config(FOLDER),
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    num_attention_heads=64,
    num_experts_per_tok=8,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
WHOLE_K2 = Holding(heads=64, expert_rows=2048, value_bytes=2, is_fused=True)
LONG = 65_536


@pytest.fixture
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


def fill(model: Model, tokens: int) -> list:
    """A cache with rows of no meaning."""
    cache = model.make_cache()
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    for layer in cache:
        layer.append(mx.random.normal((1, 1, tokens, width)))
    mx.eval([layer.state for layer in cache])
    mx.clear_cache()
    return cache


def test_k2_at_128_k_tokens() -> None:
    """All heads' keys and values at once would take 10.7 GB, all scores of 512 queries 8.6 GB."""
    attention = attention_bytes(K2, WHOLE_K2, 512, 131_072)
    assert attention == 512 * 64 * (3 * 192 + 2 * 128) * 2 + 3 * 131_072 * 640 * 2 == 557_842_432
    assert prefill_bytes(K2, WHOLE_K2, 512, 131_072) == pytest.approx(1.01e9, rel=0.01)
    assert prefill_bytes(K2, WHOLE_K2, 2048, 131_072) == pytest.approx(2.085e9, rel=0.01)


@pytest.mark.parametrize("is_fused", [True, False])
def test_memory_grows_with_the_chunk_but_hardly_with_the_context(is_fused: bool) -> None:
    holding = replace(WHOLE_K2, is_fused=is_fused)
    sizes = [prefill_bytes(K2, holding, 2**power, 131_072) for power in range(5, 12)]
    assert sizes == sorted(sizes)
    assert prefill_bytes(K2, holding, 512, 262_144) < 1.3 * prefill_bytes(K2, holding, 512, 65_536)


@pytest.mark.parametrize("at_most", [32, 512, 2048])
def test_the_largest_power_of_two_that_fits(at_most: int) -> None:
    for free in (0, 10**8, 6 * 10**8, 10**9, 2 * 10**9, 10**12):
        chunk = choose_chunk(K2, WHOLE_K2, free, 32_768, at_most)
        assert chunk in (32, 64, 128, 256, 512, 1024, 2048)
        assert chunk <= at_most
        assert chunk == MIN_CHUNK or prefill_bytes(K2, WHOLE_K2, chunk, 32_768) <= free
        assert chunk == at_most or prefill_bytes(K2, WHOLE_K2, 2 * chunk, 32_768) > free
    assert choose_chunk(K2, WHOLE_K2, 10**12, 32_768, at_most=10**6) == MAX_CHUNK


class Peers(SingleGroup):
    """A group whose other rank chose a chunk of 64."""

    def gather(self, x: mx.array) -> mx.array:
        return mx.stack([x, mx.full(x.shape, 64, x.dtype)])


def test_all_ranks_use_the_smallest_chunk(model: Model) -> None:
    assert agreed_limits(model, SingleGroup()).chunk == PREFILL_CHUNK
    assert agreed_limits(model, Peers()) == Limits(64, 64)
    assert holding_of(model) == Holding(heads=4, expert_rows=96, value_bytes=4, is_fused=False)
    assert free_bytes() > 0


@pytest.mark.parametrize(("chunk", "context"), [(128, 1_024), (512, 512), (512, 2_048)])
def test_the_formula_holds(model: Model, chunk: int, context: int) -> None:
    cache = fill(model, context - chunk)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.hidden(mx.zeros((1, chunk), mx.int32), [Part(cache, chunk)]))
    measured = mx.get_peak_memory() - active
    growth = sum(layer.state[0].nbytes for layer in cache) * chunk / context  # the caches have grown, too
    assert 0.5 < (measured - growth) / prefill_bytes(model.config, holding_of(model), chunk, context) < 1.1


@pytest.mark.sweep
def test_the_last_chunk_of_64_k_tokens_takes_little_memory(model: Model) -> None:
    model.layers = model.layers[1:2]
    cache = fill(model, LONG - PREFILL_CHUNK)
    active = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.hidden(mx.zeros((1, PREFILL_CHUNK), mx.int32), [Part(cache, PREFILL_CHUNK)]))
    assert mx.get_peak_memory() - active < prefill_bytes(model.config, holding_of(model), PREFILL_CHUNK, LONG)


@pytest.mark.sweep
def test_a_prompt_of_64_k_tokens_takes_little_memory(model: Model) -> None:
    """Long: with MLX's own BLAS on a CPU more than an hour."""
    random.seed(1)
    prompt = tuple(random.randrange(model.config.vocab_size) for _ in range(LONG - 1))
    end = list(Engine(model).generate(Request(prompt, max_tokens=1)))[-1]
    assert isinstance(end, Finished)
    assert end.statistics.peak_memory_bytes < 200e6
