"""Limits of an engine: the prefill chunk and the size of the KV cache that fit in the free memory of a rank."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device_traits import CPU_TUNING
from kimi_mlx.sizing.image_features import LARGEST_IMAGE_TOKENS, feature_budget, feature_bytes
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from kimi_mlx.sizing.prefill import MAX_CHUNK, PREFILL_CHUNK, RankShape, choose_chunk, prefill_bytes

PLANNED_CONTEXT = 32_768
"""Tokens of context that the chunk must leave room for; the model's own limit if that is less."""

CACHE_SHARE = 0.7
"""Share of the free memory for KV caches: MLX keeps freed buffers, and a buffer exists twice while it grows."""

MAX_CONTEXTS = 8
"""Number of full contexts that the default cache size is capped at."""

MIN_CACHE_TOKENS = 4096
"""Cache size to try even if less memory seems free, because the estimate may be wrong."""

MAX_CACHE_TOKENS = 2**31 - 1
"""Largest int32: ranks compare their limits as int32."""

STREAMED_WORKSPACE = 0.1
"""Largest share of the memory for experts, caches and prefill that a chunk may take if experts are read from the SSD. A
larger chunk needs fewer reads of all experts, but leaves memory for fewer of them."""


@dataclass(frozen=True)
class StreamingLimits:
    """Limits if experts are read from the SSD.

    Args:
        chunk: number of prompt tokens per step.
        sequences: maximum number of sequences that run at the same time.
    """

    chunk: int
    sequences: int


@dataclass(frozen=True)
class EngineLimits:
    """Limits that fit in the memory of all ranks.

    Args:
        chunk: number of prompt tokens per step.
        cache_tokens: number of tokens in the KV caches of all sequences together.
        feature_tokens: number of image features to keep; 0 for a model without vision.
        sequences: maximum number of sequences that run at the same time.
    """

    chunk: int
    cache_tokens: int
    feature_tokens: int = 0
    sequences: int = CPU_TUNING.max_sequences


def engine_limits(
    config: ModelConfig,
    rank_shape: RankShape,
    num_layers: int,
    free_bytes: int,
    *,
    cache_bytes: int | None = None,
    chunk: int | None = None,
    largest_chunk: int = PREFILL_CHUNK,
    encode_bytes: int = 0,
    max_sequences: int = CPU_TUNING.max_sequences,
) -> EngineLimits:
    """Return the limits of one rank. All ranks must use the smallest of each.

    Args:
        config: the model's dimensions.
        rank_shape: dimensions of the rank's share.
        num_layers: number of layers on the rank.
        free_bytes: memory that is free once the weights are loaded.
        cache_bytes: size of the KV caches; None for most of the free memory, up to MAX_CONTEXTS full contexts.
        chunk: prefill chunk; None for the largest useful one that fits.
        largest_chunk: largest useful chunk on this device.
        encode_bytes: temporary memory of the encoding of the largest image; 0 on ranks without the vision tower. A step
            has a part of an image or chunks of prompts, so only the larger one of both counts.
        max_sequences: largest useful number of sequences that run at the same time on this device.
    """
    features = feature_budget(config, free_bytes, rank_shape.value_bytes)
    free_bytes -= feature_bytes(config, features, rank_shape.value_bytes)
    context = planned_context(config)
    token_bytes = kv_bytes_per_token(config, num_layers, rank_shape.value_bytes)
    chunk = chunk or choose_chunk(config, rank_shape, free_bytes - context * token_bytes, context, largest_chunk)
    if cache_bytes is None:
        workspace_bytes = max(prefill_bytes(config, rank_shape, chunk, context), encode_bytes)
        cache_bytes = int(CACHE_SHARE * (free_bytes - workspace_bytes))
        cache_bytes = min(cache_bytes, MAX_CONTEXTS * config.max_position_embeddings * token_bytes)
    cache_tokens = min(max(cache_bytes // token_bytes, MIN_CACHE_TOKENS), MAX_CACHE_TOKENS)
    return EngineLimits(chunk, cache_tokens, features, max_sequences)


def planned_context(config: ModelConfig) -> int:
    """Return the tokens of context for which memory is left free."""
    return min(config.max_position_embeddings, PLANNED_CONTEXT)


def streamed_chunk(config: ModelConfig, rank_shape: RankShape, free_bytes: int) -> int:
    """Return the prefill chunk if experts are read from the SSD: a chunk reads nearly all of them whatever its length.

    Args:
        config: the model's dimensions.
        rank_shape: dimensions of the rank's share.
        free_bytes: memory that is left for experts, caches and prefill.
    """
    return choose_chunk(config, rank_shape, int(STREAMED_WORKSPACE * free_bytes), planned_context(config), MAX_CHUNK)


def bytes_beside_weights(
    config: ModelConfig, rank_shape: RankShape, num_layers: int, chunk: int, cache_bytes: int | None = None
) -> int:
    """Return the memory to leave free for KV caches, image features and prefill.

    Args:
        config: the model's dimensions.
        rank_shape: dimensions of the rank's share.
        num_layers: number of layers on the rank.
        chunk: prefill chunk.
        cache_bytes: size of the KV caches; None for that of the planned context.
    """
    context = planned_context(config)
    if cache_bytes is None:
        cache_bytes = context * kv_bytes_per_token(config, num_layers, rank_shape.value_bytes)
    features = LARGEST_IMAGE_TOKENS if config.vision is not None else 0
    workspace_bytes = prefill_bytes(config, rank_shape, chunk, context)
    return int(cache_bytes / CACHE_SHARE) + workspace_bytes + feature_bytes(config, features, rank_shape.value_bytes)
