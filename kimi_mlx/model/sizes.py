"""Block sizes of attention over many keys, which limit its temporary memory. Does not import MLX.

Letters: B batch, H heads, T tokens in the cache, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

from __future__ import annotations

KEY_BLOCK = 512
"""Number of cached tokens that are expanded into keys and values at once, without a fused kernel."""

QUERY_BLOCK = 64
"""Number of queries per block among the new tokens; at most half of a diagonal block is wasted work."""

SCORES_MAX = 2**23
"""Maximum number of scores in the latent space that exist at once, for several queries of a sequence."""

NUMPY_ROW_BLOCK = 256
"""Rows of queries per block of kimi_mlx.model.numpy_attention, a row per token and head. Tokens are not divided."""

NUMPY_KEY_BLOCK = 1024
"""Cached tokens per block there: the scores of a block (1 MiB) stay in the processor's second-level cache."""

EXPANDED_MAX_BYTES = 2**29
"""Maximum size of the keys and values that are expanded at once for a fused kernel, which needs the whole context."""

VISION_SCORES_MAX = 2**23
"""Maximum number of scores in memory at once in the vision tower, without a fused kernel: 32 MiB in float32."""


def vision_query_block(heads: int, keys: int) -> int:
    """Return the number of patches of an image that attend at once to all of its patches; at least one."""
    return max(1, min(keys, VISION_SCORES_MAX // (heads * keys)))


def expanded_width(nope: int, rope: int, value: int) -> int:
    """Return elements per token and head of a fused kernel's input: partial keys, keys, values, padded values."""
    return nope + (nope + rope) + value + max(nope + rope, value)


def latent_key_block(rows: int) -> int:
    """Return the number of cached tokens whose scores with `rows` rows of queries exist at once."""
    return max(KEY_BLOCK, SCORES_MAX // rows)


def heads_at_once(heads: int, head_bytes: int) -> int:
    """Return the number of heads whose keys and values, `head_bytes` each, are in memory at once; at least one."""
    return max(1, min(heads, EXPANDED_MAX_BYTES // head_bytes))
