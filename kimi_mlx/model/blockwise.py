"""Causal attention of many queries over many keys, by heads or in the latent space, without storing all scores.

Keys are processed in blocks with a running maximum and running sums (online softmax), so the result is exact.
Letters: B batch, H heads, L queries, Q size of a query, V size of a value, G rows of q per token.
Source: Rabe and Staats 2021 (https://arxiv.org/abs/2112.05682), Dao et al. 2022 (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from kimi_mlx.model.sizes import KEY_BLOCK, QUERY_BLOCK

Expand = Callable[[mx.array], tuple[mx.array, mx.array]]
"""Function from n rows of the cache, (B, 1, n, R + P), to keys (B, H, n, Q) and values (B, H, n, V)."""


class SoftmaxState(NamedTuple):
    """Running maximum and sums over the keys so far, for each query."""

    peak: mx.array
    """Largest score, (B, H, L, 1) float32."""
    total: mx.array
    """Sum of exp(score - peak), (B, H, L, 1) float32."""
    values: mx.array
    """Sum of exp(score - peak) * value, (B, H, L, V) float32."""

    def rows(self, start: int, stop: int) -> SoftmaxState:
        """Return the state of some queries."""
        return SoftmaxState(*(part[:, :, start:stop] for part in self))


def attend(
    q: mx.array, rows: mx.array, expand: Expand, mask: mx.array, rows_per_token: int = 1, key_block: int | None = None
) -> mx.array:
    """Compute attention of the last L of T tokens, each to all tokens up to itself.

    Each block depends on the previous one (mx.depends); otherwise MLX may expand all keys first.

    Args:
        q: (B, H, L * G, Q), scaled; the G rows of a token are adjacent.
        rows: (B, 1, T, R + P), rows of the cache.
        expand: function from rows to keys and values.
        mask: (QUERY_BLOCK, at least L), causal and additive: the last query sees the last key.
        rows_per_token: G; in the latent space all heads of a token share the keys, so that they can be rows of one
            matrix.
        key_block: number of cached tokens whose scores exist at once; None for KEY_BLOCK.

    Returns:
        (B, H, L * G, V) in q's dtype.
    """
    length, total = q.shape[2] // rows_per_token, rows.shape[2]
    past, key_block = total - length, key_block or KEY_BLOCK
    sums = None
    for start in range(0, past, key_block):
        block = rows[:, :, start : min(start + key_block, past)]
        sums = _add(sums, q, *expand(_after(sums, block)))
    k, v = expand(_after(sums, rows[:, :, past:]))
    outputs: list[mx.array] = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first, end = start * rows_per_token, stop * rows_per_token
        before = None if sums is None else sums.rows(first, end)
        queries = _after(outputs[-1:], q[:, :, first:end])
        visible = mask[start - stop :, -stop:]
        if rows_per_token > 1:
            visible = mx.repeat(visible, rows_per_token, axis=0)
        final = _add(before, queries, k[:, :, :stop], v[:, :, :stop], visible)
        outputs.append((final.values / final.total).astype(q.dtype))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _after(first: Sequence[mx.array] | None, then: mx.array) -> mx.array:
    """Make `then` depend on `first`, if there is any."""
    return mx.depends(then, list(first)) if first else then


def _add(
    sums: SoftmaxState | None, q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None
) -> SoftmaxState:
    """Add keys and values to the state."""
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
