"""Batches of sequences of unequal length against the same sequences one by one."""

from __future__ import annotations

import mlx.core as mx

from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, filled_cache, model_config, random_tokens
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model, SequenceSlice

BATCHES = {
    "decode": [(5, 1), (40, 1), (44, 1), (300, 1), (700, 1)],
    "decode and prefill": [(5, 1), (300, 1), (0, 70)],
    "drafts": [(3, 4), (30, 1), (300, 8)],
}
"""(cached, new) tokens of each sequence."""

LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.7}
"""In bfloat16 another shape rounds differently, so that the router may choose another expert."""


def check(context: Context) -> None:
    """Compare the logits of all new tokens."""
    weights = RandomWeights(model_config(context.sizes))
    for dtype in context.dtypes:
        with context.on_device():
            model = weights.model(dtype)
        for label, lengths in BATCHES.items():
            context.progress(f"{label} in {str(dtype).removeprefix('mlx.core.')}")
            tokens = [random_tokens(new, model.config.vocab_size, seed) for seed, (_, new) in enumerate(lengths)]
            with context.on_device():
                single = [
                    _logits(model, part, [(filled_cache(model, cached, seed), part.shape[1])])
                    for seed, (part, (cached, _)) in enumerate(zip(tokens, lengths, strict=True))
                ]
                slices = [(filled_cache(model, cached, seed), new) for seed, (cached, new) in enumerate(lengths)]
                batched = _logits(model, mx.concatenate(tokens, axis=1), slices)
                expected = mx.concatenate(single, axis=1)
                mx.eval(batched, expected)
            name = f"{label} {str(dtype).removeprefix('mlx.core.')}"
            context.compare(name, batched, expected, LIMITS[dtype])


def _logits(model: Model, tokens: mx.array, slices: list[tuple[list[LatentCache], int]]) -> mx.array:
    hidden = model.hidden(tokens, [SequenceSlice(cache, length, length) for cache, length in slices])
    return model.logits(hidden)
