"""Causal attention by heads of many queries over many keys, without a tensor of all scores.

Keys come a block at a time; what they add is kept as a running maximum and sums, so the result is that of the plain
formula. Letters: B batch, H heads, L queries, Q width of a query, V width of a value.
Source: Rabe and Staats 2021 (https://arxiv.org/abs/2112.05682), Dao et al. 2022 (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from kimi_mlx.model.sizes import KEY_BLOCK, QUERY_BLOCK

Expand = Callable[[mx.array], tuple[mx.array, mx.array]]
"""Makes keys (B, H, n, Q) and values (B, H, n, V) of n rows of the cache, (B, 1, n, R + P)."""


class SoftmaxState(NamedTuple):
    """What the keys so far add up to, for each query."""

    peak: mx.array
    """Largest score, (B, H, L, 1) float32."""
    total: mx.array
    """Sum of exp(score - peak), (B, H, L, 1) float32."""
    values: mx.array
    """Sum of exp(score - peak) * value, (B, H, L, V) float32."""

    def rows(self, start: int, stop: int) -> SoftmaxState:
        """Those of some queries."""
        return SoftmaxState(*(part[:, :, start:stop] for part in self))


def attend(q: mx.array, rows: mx.array, expand: Expand, mask: mx.array) -> mx.array:
    """Attention of the last L of T tokens, each seeing all up to itself.

    Each part waits for the one before (mx.depends), else MLX might expand all keys first.

    Args:
        q: (B, H, L, Q), already scaled.
        rows: of the cache, (B, 1, T, R + P).
        expand: makes keys and values of some of them.
        mask: causal and additive, (QUERY_BLOCK, at least L): the last query sees the last key.

    Returns:
        (B, H, L, V) in q's dtype.
    """
    length, total = q.shape[2], rows.shape[2]
    past = total - length
    sums = None
    for start in range(0, past, KEY_BLOCK):
        block = rows[:, :, start : min(start + KEY_BLOCK, past)]
        sums = _add(sums, q, *expand(_after(sums, block)))
    k, v = expand(_after(sums, rows[:, :, past:]))
    done: list[mx.array] = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        before = None if sums is None else sums.rows(start, stop)
        queries = _after(done[-1:], q[:, :, start:stop])
        ended = _add(before, queries, k[:, :, :stop], v[:, :, :stop], mask[start - stop :, -stop:])
        done.append((ended.values / ended.total).astype(q.dtype))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=2)


def _after(first: Sequence[mx.array] | None, then: mx.array) -> mx.array:
    """`then`, to be computed after `first`, if there is any."""
    return mx.depends(then, list(first)) if first else then


def _add(
    sums: SoftmaxState | None, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
) -> SoftmaxState:
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
    return SoftmaxState(peak, total, values)
