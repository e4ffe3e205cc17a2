"""How attention of a prompt is cut up, so that its temporary memory stays small; no MLX.

Letters: B batch, H heads, T tokens in the cache, N qk_nope_head_dim, P qk_rope_head_dim, V v_head_dim.
"""

from __future__ import annotations

KEY_BLOCK = 512
"""Cached tokens that are expanded into keys and values at once, where no fused kernel takes all."""

QUERY_BLOCK = 64
"""Queries that see each other at once: of the scores among new tokens, all but half a block are needed."""

EXPANDED_MAX_BYTES = 2**29
"""Where a fused kernel takes the keys and values of a whole context, those of so many heads are made at once."""


def expanded_width(nope: int, rope: int, value: int) -> int:
    """Elements a token and head while a fused kernel's input is made: part of the keys, keys, values, padded values."""
    return nope + (nope + rope) + value + max(nope + rope, value)


def heads_at_once(heads: int, head_bytes: int) -> int:
    """How many heads' keys and values, of `head_bytes` each, are in memory at once; at least one."""
    return max(1, min(heads, EXPANDED_MAX_BYTES // head_bytes))
