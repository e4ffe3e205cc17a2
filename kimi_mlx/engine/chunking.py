"""How many tokens of a prompt go through the model at once: as many as pay, if their temporary memory fits; no MLX."""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.sizes import KEY_BLOCK, QUERY_BLOCK, expanded_width, heads_at_once

MIN_CHUNK = 32
MAX_CHUNK = 2048

PREFILL_CHUNK = 512
"""The chunk where memory does not matter: large enough to keep the machine busy, small enough to show progress and to
be stopped. On the CPU larger ones gain less than the noise (docs/benchmark.md)."""

FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Holding:
    """What prefill needs to know of the weights that a rank holds, and of how it computes.

    Args:
        heads: attention heads here.
        expert_rows: of moe_intermediate_size, in every expert here.
        value_bytes: of one number in the compute dtype.
        is_fused: whether MLX's fused attention takes the model's heads (kimi_mlx.model.attention.is_fused).
    """

    heads: int
    expert_rows: int
    value_bytes: int
    is_fused: bool


def choose_chunk(
    config: ModelConfig, holding: Holding, free_bytes: int, context: int, at_most: int = PREFILL_CHUNK
) -> int:
    """The largest power of two from MIN_CHUNK to `at_most` (itself at most MAX_CHUNK) whose memory fits.

    Ranks must use the smallest of their answers. If not even MIN_CHUNK fits, it is the answer all the same.

    Args:
        config: the model's dimensions.
        holding: of this rank.
        free_bytes: what may be used beside weights and cache.
        context: tokens in the cache in the end.
        at_most: a power of two.
    """
    chunk = min(at_most, MAX_CHUNK)
    while chunk > MIN_CHUNK and prefill_bytes(config, holding, chunk, context) > free_bytes:
        chunk //= 2
    return chunk


def prefill_bytes(config: ModelConfig, holding: Holding, chunk: int, context: int) -> int:
    """Temporary memory of the last chunk of a prompt that fills the context: one layer's, layers follow each other.

    The states of all new tokens, attention, the experts, and the cache of a layer while it grows; weights and the
    caches themselves are not in it. Attention and experts are added up although they follow each other, since MLX
    keeps freed memory for the next array of about the same size.
    """
    states = 4 * chunk * config.hidden_size
    growth = context * (config.kv_lora_rank + config.qk_rope_head_dim)
    values = states + growth + _experts(config, holding, chunk)
    return values * holding.value_bytes + attention_bytes(config, holding, chunk, context)


def attention_bytes(config: ModelConfig, holding: Holding, chunk: int, context: int) -> int:
    """Queries, outputs, expanded keys and values, and what there is of the scores.

    With a fused kernel there are no scores, and the keys and values of the whole context are there for some heads at
    a time. Without one there are those of a block of tokens (or of the chunk) for all heads, and for each query the
    scores of a block four times over and three sums twice, in float32 (measured: tests/unit/engine/test_chunking.py).
    """
    heads, value = holding.heads, config.v_head_dim
    width = expanded_width(config.qk_nope_head_dim, config.qk_rope_head_dim, value)
    outside = chunk * heads * (3 * config.qk_head_dim + 2 * value) * holding.value_bytes
    if holding.is_fused:
        head_bytes = context * width * holding.value_bytes
        return outside + heads_at_once(heads, head_bytes) * head_bytes
    past = max(context - chunk, 0)
    block = max(min(KEY_BLOCK, past), chunk)
    scores = max(min(KEY_BLOCK, past), min(QUERY_BLOCK, chunk)) * chunk
    sums = 3 * chunk * value
    return outside + heads * (block * width * holding.value_bytes + (4 * scores + 2 * sums) * FLOAT32_BYTES)


def _experts(config: ModelConfig, holding: Holding, chunk: int) -> int:
    """Numbers in a MoE layer: each choice's input, gate and up twice, and output twice; or in a dense layer."""
    chosen = config.num_experts_per_tok + config.n_shared_experts
    moe = chosen * (3 * config.hidden_size + 4 * holding.expert_rows)
    return chunk * max(moe, 4 * config.intermediate_size)
