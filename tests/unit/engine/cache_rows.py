"""KV caches without a model. As in a real one, each row depends on all tokens up to its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import mlx.core as mx
import numpy as np

from kimi_mlx.engine.kv_cache_pool import KVCachePool, SequenceCache
from kimi_mlx.engine.prompt_cache.block_file import BlockShape
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model

LAYERS, WIDTH = 2, 3
SHAPE = BlockShape(LAYERS, WIDTH, mx.float32)
MEGABYTE = 10**6


class RowsModel:
    """The part of a model that a pool uses."""

    config = SimpleNamespace(max_position_embeddings=4096)

    def make_cache(self) -> list[LatentCache]:
        return [LatentCache() for _ in range(LAYERS)]


MODEL = cast(Model, RowsModel())


def rows(tokens: Sequence[int]) -> np.ndarray:
    """Return (LAYERS, tokens, WIDTH), float32: a running hash, the token and the position, offset by the layer."""
    running, values = 0, np.zeros((LAYERS, len(tokens), WIDTH), np.float32)
    for at, token in enumerate(tokens):
        running = (running * 31 + token) % 65_521
        values[:, at] = running, token, at
    return values + np.arange(LAYERS, dtype=np.float32)[:, None, None]


def append_tokens(cache: SequenceCache, tokens: Sequence[int]) -> None:
    """Append tokens to a cache as the engine does."""
    fresh = mx.array(rows([*cache.tokens, *tokens])[:, len(cache.tokens) :])
    for layer, layer_rows in zip(cache.layers, fresh, strict=True):
        layer.append(layer_rows[None, None])
    cache.tokens.extend(tokens)


def check(cache: SequenceCache) -> None:
    """Check that the rows belong to the tokens."""
    if cache.tokens:
        assert np.array_equal(np.array(cache.rows(0, len(cache.tokens))), rows(cache.tokens))
    assert {layer.offset for layer in cache.layers} == {len(cache.tokens)}


def run_turn(pool: KVCachePool, prompt: Sequence[int], answer: Sequence[int] = ()) -> int:
    """Run one turn of a conversation; return the number of cached prompt tokens."""
    cache, cached = pool.acquire(tuple(prompt))
    assert cache.tokens == list(prompt[:cached])
    check(cache)
    append_tokens(cache, [*prompt[cached:], *answer])
    pool.release(cache)
    return cached


def open_store(
    folder: Path,
    warnings: list[str] | None = None,
    key: str = "key",
    share: str = "rank-0",
    stamp: str = "",
    shape: BlockShape = SHAPE,
    max_bytes: int = 100 * MEGABYTE,
) -> BlockStore:
    """Open a store. Warnings go into the list; without a list there must be none."""

    def warn(text: str) -> None:
        assert warnings is not None, text
        warnings.append(text)

    return BlockStore(folder, key, share, stamp, shape, max_bytes, warn=warn)
