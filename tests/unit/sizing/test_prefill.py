"""Memory of prefill, the largest chunk that fits, and the engine's limits. No model is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.model.config import load_config
from kimi_mlx.sizing.engine_limits import CACHE_SHARE, MAX_CACHE_TOKENS, MIN_CACHE_TOKENS, EngineLimits, engine_limits
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from kimi_mlx.sizing.prefill import (
    MAX_CHUNK,
    MIN_CHUNK,
    PREFILL_CHUNK,
    RankShape,
    attention_bytes,
    choose_chunk,
    prefill_bytes,
)

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
WHOLE_K2 = RankShape(heads=64, expert_rows=2048, value_bytes=2, is_fused=True)


def test_k2_at_128_k_tokens() -> None:
    """All heads' keys and values at once would take 10.7 GB, all scores of 512 queries 8.6 GB."""
    attention = attention_bytes(K2, WHOLE_K2, 512, 131_072)
    assert attention == 512 * 64 * (3 * 192 + 2 * 128) * 2 + 3 * 131_072 * 640 * 2 == 557_842_432
    assert prefill_bytes(K2, WHOLE_K2, 512, 131_072) == pytest.approx(1.01e9, rel=0.01)
    assert prefill_bytes(K2, WHOLE_K2, 2048, 131_072) == pytest.approx(2.085e9, rel=0.01)


@pytest.mark.parametrize("is_fused", [True, False])
def test_memory_grows_with_the_chunk_but_hardly_with_the_context(is_fused: bool) -> None:
    rank_shape = replace(WHOLE_K2, is_fused=is_fused)
    sizes = [prefill_bytes(K2, rank_shape, 2**power, 131_072) for power in range(5, 12)]
    assert sizes == sorted(sizes)
    assert prefill_bytes(K2, rank_shape, 512, 262_144) < 1.3 * prefill_bytes(K2, rank_shape, 512, 65_536)


@pytest.mark.parametrize("limit", [32, 512, 2048])
def test_the_largest_power_of_two_that_fits(limit: int) -> None:
    for free in (0, 10**8, 6 * 10**8, 10**9, 2 * 10**9, 10**12):
        chunk = choose_chunk(K2, WHOLE_K2, free, 32_768, limit)
        assert chunk in (32, 64, 128, 256, 512, 1024, 2048)
        assert chunk <= limit
        assert chunk == MIN_CHUNK or prefill_bytes(K2, WHOLE_K2, chunk, 32_768) <= free
        assert chunk == limit or prefill_bytes(K2, WHOLE_K2, 2 * chunk, 32_768) > free
    assert choose_chunk(K2, WHOLE_K2, 10**12, 32_768, limit=10**6) == MAX_CHUNK


def test_kv_cache_of_k2() -> None:
    assert kv_bytes_per_token(K2) == (512 + 64) * 61 * 2
    assert kv_bytes_per_token(K2, num_layers=30, value_bytes=4) == (512 + 64) * 30 * 4


def test_the_cache_leaves_room_for_prefill_or_for_the_encoding_of_an_image() -> None:
    free_bytes, prefill = 10**10, prefill_bytes(K2, WHOLE_K2, 512, 32_768)

    def cache_bytes(encode_bytes: int) -> int:
        limits = engine_limits(K2, WHOLE_K2, 61, free_bytes, chunk=512, encode_bytes=encode_bytes)
        return limits.cache_tokens * kv_bytes_per_token(K2)

    assert cache_bytes(prefill // 2) == cache_bytes(0)
    assert cache_bytes(0) - cache_bytes(prefill + 10**9) == pytest.approx(CACHE_SHARE * 10**9, rel=1e-3)


@pytest.mark.parametrize("free_bytes", [0, 10**9, 10**11, 10**13])
def test_engine_limits_stay_within_their_bounds(free_bytes: int) -> None:
    limits = engine_limits(K2, WHOLE_K2, 61, free_bytes)
    assert MIN_CHUNK <= limits.chunk <= PREFILL_CHUNK
    assert MIN_CACHE_TOKENS <= limits.cache_tokens <= MAX_CACHE_TOKENS
    chosen = engine_limits(K2, WHOLE_K2, 61, free_bytes, cache_bytes=10_000 * kv_bytes_per_token(K2), chunk=64)
    assert chosen == EngineLimits(64, 10_000)
