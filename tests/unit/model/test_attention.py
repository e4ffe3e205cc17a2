"""Inputs of the matrix products of attention."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from kimi_mlx.model import attention
from kimi_mlx.model.attention_cost import AttentionCost
from kimi_mlx.model.config import load_config
from kimi_mlx.weights.assemble import load_model
from tests.fakes import KIMI_MINI


@pytest.mark.parametrize("is_fused", [False, True])
def test_latents_are_contiguous_before_they_are_broadcast_to_the_heads(
    is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX copies an input with gaps between its rows once per head: 2 x 2 GB a layer and chunk in K2 at 32 k tokens."""
    model = load_model(KIMI_MINI, load_config(KIMI_MINI), mx.float32)
    heads = model.config.num_attention_heads
    broadcast: list[mx.array] = []
    original = mx.quantized_matmul

    def quantized_matmul(x: mx.array, weight: mx.array, *args: Any, **options: Any) -> mx.array:
        if weight.ndim == 3 and weight.shape[0] > 1 and x.shape[-3] == 1:
            broadcast.append(x)
        return original(x, weight, *args, **options)

    monkeypatch.setattr(mx, "quantized_matmul", quantized_matmul)
    monkeypatch.setattr(attention, "has_fused_attention", lambda *args: is_fused)
    monkeypatch.setattr(AttentionCost, "is_latent", lambda cost, offset, length: False)
    tokens = mx.random.randint(0, model.config.vocab_size, (1, 90))
    cache = model.make_cache()
    for part in (tokens[:, :50], tokens[:, 50:]):
        mx.eval(model(part, cache), broadcast)
    assert len(broadcast) >= 2 * 2 * len(model.layers)  # keys and values, two chunks
    for x in broadcast:
        strides = memoryview(x).strides  # pyright: ignore[reportArgumentType]
        assert strides is not None
        assert strides[-2:] == (x.shape[-1] * x.itemsize, x.itemsize)
    assert heads > 1
