"""Causal attention by heads of many queries over many keys, without a tensor of all scores.

Keys come a block at a time; what they add is kept as a running maximum and sums, so the result is that of the plain
formula. Letters: B batch, H heads, L queries, Q width of a query, V width of a value.
Source: Rabe and Staats 2021 (https://arxiv.org/abs/2112.05682), Dao et al. 2022 (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

KEY_BLOCK = 512
"""Cached tokens that are expanded into keys and values at once."""

QUERY_BLOCK = 64
"""Queries that see each other at once: of the scores among new tokens, all but half a block are needed."""

EXPANDED_MAX_BYTES = 2**29
"""Where a fused kernel takes the keys and values of a whole context, those of so many heads are made at once."""

Expand = Callable[[int, int], tuple[mx.array, mx.array]]
"""Keys (B, H, n, Q) and values (B, H, n, V) of the n tokens from the first number up to the second."""


class Sums(NamedTuple):
    """What the keys so far add up to, for each query."""

    peak: mx.array
    """Largest score, (B, H, L, 1) float32."""
    total: mx.array
    """Sum of exp(score - peak), (B, H, L, 1) float32."""
    values: mx.array
    """Sum of exp(score - peak) * value, (B, H, L, V) float32."""

    def rows(self, start: int, stop: int) -> Sums:
        """Those of some queries."""
        return Sums(*(part[:, :, start:stop] for part in self))


def attend(q: mx.array, expand: Expand, total: int, mask: mx.array) -> mx.array:
    """Attention of the last L of `total` tokens, each seeing all up to itself.

    Args:
        q: (B, H, L, Q), already scaled.
        expand: makes keys and values of some tokens.
        total: tokens with the new ones.
        mask: causal and additive, (QUERY_BLOCK, at least L): the last query sees the last key.

    Returns:
        (B, H, L, V) in q's dtype.
    """
    length = q.shape[2]
    past = total - length
    sums = None
    for start in range(0, past, KEY_BLOCK):
        sums = _add(sums, q, *expand(start, min(start + KEY_BLOCK, past)))
    k, v = expand(past, total)
    done: list[mx.array] = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        before = None if sums is None else sums.rows(start, stop)
        seen = mask[start - stop :, -stop:]
        ended = _add(before, q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], seen)
        done.append((ended.values / ended.total).astype(q.dtype))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=2)


def _add(sums: Sums | None, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> Sums:
    """Add some keys and values to what was there before."""
    scores = (q @ k.swapaxes(-1, -2)).astype(mx.float32)  # (B, H, L, n)
    if mask is not None:
        scores = scores + mask
    peak = scores.max(axis=-1, keepdims=True)
    if sums is not None:
        peak = mx.maximum(peak, sums.peak)
    weights = mx.exp(scores - peak)
    total, values = weights.sum(axis=-1, keepdims=True), (weights.astype(v.dtype) @ v).astype(mx.float32)
    if sums is not None:
        shrink = mx.exp(sums.peak - peak)
        total, values = total + shrink * sums.total, values + shrink * sums.values
    return Sums(peak, total, values)


def expanded_width(nope: int, rope: int, value: int) -> int:
    """Elements a token and head while a fused kernel's input is made: part of the keys, keys, values, padded values."""
    return nope + (nope + rope) + value + max(nope + rope, value)


def heads_at_once(heads: int, head_bytes: int) -> int:
    """How many heads' keys and values, of `head_bytes` each, are in memory at once."""
    return max(1, min(heads, EXPANDED_MAX_BYTES // head_bytes))
