"""Temporary memory of prefill, and the largest chunk of a prompt that fits in the free memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kimi_mlx.model.attention_cost import AttentionCost, AttentionShape
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device_traits import FLOAT32_BYTES, TUNINGS, DeviceKind
from kimi_mlx.model.sizes import (
    KEY_BLOCK,
    NUMPY_KEY_BLOCK,
    NUMPY_ROW_BLOCK,
    QUERY_BLOCK,
    SCORES_MAX,
    expanded_width,
    heads_at_once,
)
from kimi_mlx.sizing.kv_cache import kv_values_per_token

MIN_CHUNK = 32
MAX_CHUNK = 8192

PREFILL_CHUNK = TUNINGS["metal"].prefill_chunk
"""Chunk size on a Mac if memory is no limit."""


@dataclass(frozen=True)
class RankShape:
    """Dimensions of a rank's share of the model that determine the memory of prefill.

    Args:
        heads: number of attention heads on the rank.
        expert_rows: number of rows of each expert on the rank, moe_intermediate_size for whole experts.
        value_bytes: bytes per value in the compute dtype.
        is_fused: whether MLX has a fused kernel for the model's attention (kimi_mlx.model.device_traits).
        device: kind of the rank's device.
        in_numpy: whether NumPy computes attention in the latent space.
    """

    heads: int
    expert_rows: int
    value_bytes: int
    is_fused: bool
    device: DeviceKind = "metal"
    in_numpy: bool = False


def choose_chunk(
    config: ModelConfig, rank_shape: RankShape, free_bytes: int, context: int, limit: int = PREFILL_CHUNK
) -> int:
    """Return the largest power of two from MIN_CHUNK to `limit` (capped at MAX_CHUNK) whose memory fits.

    If not even MIN_CHUNK fits, return MIN_CHUNK. All ranks must use the smallest result of any rank.

    Args:
        config: the model's dimensions.
        rank_shape: dimensions of this rank's share.
        free_bytes: memory left after weights and KV cache.
        context: number of tokens in the KV cache at the end of the prompt.
        limit: upper limit, a power of two.
    """
    chunk = min(limit, MAX_CHUNK)
    while chunk > MIN_CHUNK and prefill_bytes(config, rank_shape, chunk, context) > free_bytes:
        chunk //= 2
    return chunk


def prefill_bytes(config: ModelConfig, rank_shape: RankShape, chunk: int, context: int) -> int:
    """Return the temporary memory of the last chunk of a prompt that fills the context.

    Only one layer counts, since layers run one after the other: the hidden states of the chunk, attention, the experts,
    and one layer's KV cache while it grows. Weights and the KV caches themselves are not included. Attention and
    experts are added although they do not run at the same time, because MLX keeps freed buffers for reuse.
    """
    states = 4 * chunk * config.hidden_size
    growth = context * kv_values_per_token(config)
    values = states + growth + _mlp_values(config, rank_shape, chunk)
    return values * rank_shape.value_bytes + attention_bytes(config, rank_shape, chunk, context)


def attention_bytes(config: ModelConfig, rank_shape: RankShape, chunk: int, context: int) -> int:
    """Return the memory of queries, outputs, expanded keys and values, and scores.

    With a fused kernel there are no scores; keys and values of the whole context exist for a few heads at a time.
    Without one, keys and values of one block of tokens (or of the chunk) exist for all heads, and for each query four
    copies of a block's scores and two copies of three partial sums, in float32 (measured by
    tests/unit/engine/test_free_memory.py).
    """
    heads, value = rank_shape.heads, config.v_head_dim
    width = expanded_width(config.qk_nope_head_dim, config.qk_rope_head_dim, value)
    outside = chunk * heads * (3 * config.qk_head_dim + 2 * value) * rank_shape.value_bytes
    cost = AttentionCost(AttentionShape.of(config, heads), TUNINGS[rank_shape.device])
    latent = _latent_bytes(cost, rank_shape, chunk, context)
    if cost.break_even == math.inf:
        return outside + latent
    if rank_shape.is_fused:
        head_bytes = context * width * rank_shape.value_bytes
        return outside + max(latent, heads_at_once(heads, head_bytes) * head_bytes)
    past = max(context - chunk, 0)
    block = max(min(KEY_BLOCK, past), chunk)
    scores = max(min(KEY_BLOCK, past), min(QUERY_BLOCK, chunk)) * chunk
    sums = 3 * chunk * value
    by_heads = heads * (block * width * rank_shape.value_bytes + (4 * scores + 2 * sums) * FLOAT32_BYTES)
    return outside + max(latent, by_heads)


def _latent_bytes(cost: AttentionCost, rank_shape: RankShape, chunk: int, context: int) -> int:
    """Return the memory of attention in the latent space: three copies of the queries, outputs, and scores.

    There are no expanded keys, but up to four copies of at most SCORES_MAX scores and of the sums, in float32
    (Attention.latent_group); or in NumPy the scores of one block, and two copies of the outputs.
    """
    shape, value_bytes = cost.shape, rank_shape.value_bytes
    rows = cost.max_latent_queries(chunk) * shape.heads
    queries = 3 * rows * (shape.latent_dim + shape.rope_dim) * value_bytes
    if rank_shape.in_numpy:
        scores = max(NUMPY_ROW_BLOCK, shape.heads) * NUMPY_KEY_BLOCK
        return queries + (2 * rows * shape.latent_dim + scores) * FLOAT32_BYTES
    return queries + 4 * (min(SCORES_MAX, rows * context) + rows * shape.latent_dim) * FLOAT32_BYTES


def _mlp_values(config: ModelConfig, rank_shape: RankShape, chunk: int) -> int:
    """Return the number of values in an MLP, MoE or dense, whichever has more.

    A MoE layer has, for each token and chosen expert, the input, gate and up twice, and the output twice.
    """
    num_experts = config.num_experts_per_tok + config.n_shared_experts
    moe = num_experts * (3 * config.hidden_size + 4 * rank_shape.expert_rows)
    return chunk * max(moe, 4 * config.intermediate_size)
