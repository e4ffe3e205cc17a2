"""Attention by blocks of keys, or some heads at a time, equals the plain formula."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model import attention, blockwise, sizes
from kimi_mlx.model.attention_cost import AttentionCost
from kimi_mlx.model.batch_layout import causal_mask
from kimi_mlx.model.blockwise import attend
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.sizes import EXPANDED_MAX_BYTES, KEY_BLOCK, QUERY_BLOCK, expanded_width, heads_at_once
from kimi_mlx.weights.assemble import load_model

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"
HEADS, Q_DIM, V_DIM = 3, 24, 16


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return softmax(q k^T) v in float64, causal; the queries are the last positions of the keys."""
    length, total = q.shape[-2], k.shape[-2]
    scores = np.where(np.arange(total) <= np.arange(total - length, total)[:, None], q @ k.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize(
    "past",
    [0, KEY_BLOCK - 1, 2 * KEY_BLOCK + 77, *(pytest.param(past, marks=pytest.mark.slow) for past in (1, KEY_BLOCK))],
)
@pytest.mark.parametrize("length", [1, QUERY_BLOCK - 1, QUERY_BLOCK, 3 * QUERY_BLOCK + 5])
def test_blocks_add_up_to_the_plain_formula(past: int, length: int) -> None:
    random = np.random.default_rng(past + length)
    q = random.normal(size=(2, HEADS, length, Q_DIM)) * 3  # peaks that grow from block to block
    k, v = (random.normal(size=(2, HEADS, past + length, dim)) for dim in (Q_DIM, V_DIM))
    expanded: list[int] = []

    def expand(rows: mx.array) -> tuple[mx.array, mx.array]:
        """Each row holds the index of its token."""
        tokens = np.array(rows[0, 0, :, 0])
        expanded.extend(tokens.tolist())
        assert len(tokens) <= max(KEY_BLOCK, length)
        return mx.array(k[:, :, tokens], mx.float32), mx.array(v[:, :, tokens], mx.float32)

    mask = causal_mask(QUERY_BLOCK, max(QUERY_BLOCK, length), mx.float32)
    rows = mx.broadcast_to(mx.arange(past + length)[:, None], (2, 1, past + length, 1))
    got = attend(mx.array(q, mx.float32), rows, expand, mask)
    np.testing.assert_allclose(np.array(got), plain(q, k, v), rtol=1e-4, atol=1e-5)
    assert expanded == list(range(past + length))


@pytest.fixture(scope="module")
def one_by_one() -> tuple[Model, mx.array, np.ndarray]:
    """Return a model, 150 tokens, and their logits from steps of 8, whose attention is in the latent space."""
    model = load_model(FOLDER, load_config(FOLDER), mx.float32)
    mx.random.seed(5)
    tokens = mx.random.randint(0, model.config.vocab_size, (1, 150))
    cache = model.make_cache()
    logits = [model(tokens[:, start : start + 8], cache) for start in range(0, 150, 8)]
    return model, tokens, np.array(mx.concatenate(logits, axis=1))


@pytest.mark.parametrize(
    ("chunks", "at_once"),
    [
        ([13, 1, 60, 76], 3),
        *(
            pytest.param(chunks, at_once, marks=pytest.mark.slow)
            for chunks, at_once in (
                *(([150], None), ([150], 1), ([150], 3), ([100, 50], None), ([100, 50], 1), ([100, 50], 3)),
                *(([13, 1, 60, 76], None), ([13, 1, 60, 76], 1)),
            )
        ),
    ],
)
def test_chunks_and_groups_of_heads_give_the_same_logits(
    one_by_one: tuple[Model, mx.array, np.ndarray],
    chunks: list[int],
    at_once: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens, expected = one_by_one
    monkeypatch.setattr(blockwise, "KEY_BLOCK", 32)
    monkeypatch.setattr(AttentionCost, "is_latent", lambda cost, offset, length: False)
    if at_once is not None:
        monkeypatch.setattr(attention, "has_fused_attention", lambda *args: True)
        monkeypatch.setattr(attention, "heads_at_once", lambda heads, head_bytes: at_once)
    cache, parts, start = model.make_cache(), [], 0
    for length in chunks:
        parts.append(model(tokens[:, start : start + length], cache))
        start += length
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("scores_max", "chunks"), [(1, [70, 40, 40]), (4 * 40 * 60, [20, 130]), (10**9, [149, 1]), (1, [150])]
)
def test_many_queries_in_the_latent_space_give_the_same_logits(
    one_by_one: tuple[Model, mx.array, np.ndarray],
    chunks: list[int],
    scores_max: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens, expected = one_by_one
    monkeypatch.setattr(attention, "SCORES_MAX", scores_max)
    monkeypatch.setattr(sizes, "SCORES_MAX", scores_max)
    monkeypatch.setattr(sizes, "KEY_BLOCK", 32)
    monkeypatch.setattr(attention, "uses_numpy", lambda *args: False)
    monkeypatch.setattr(AttentionCost, "is_latent", lambda cost, offset, length: True)
    cache, parts, start = model.make_cache(), [], 0
    for length in chunks:
        parts.append(model(tokens[:, start : start + length], cache))
        start += length
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)), expected, rtol=2e-3, atol=2e-3)


def test_keys_of_k2_at_128_k_tokens_fit() -> None:
    head_bytes = 131_072 * expanded_width(nope=128, rope=64, value=128) * 2
    assert head_bytes == 167_772_160
    assert heads_at_once(64, head_bytes) == 3
    assert 3 * head_bytes <= EXPANDED_MAX_BYTES
    assert heads_at_once(64, EXPANDED_MAX_BYTES + 1) == 1
    assert heads_at_once(64, head_bytes // 128) == 64  # 1024 tokens: all at once
