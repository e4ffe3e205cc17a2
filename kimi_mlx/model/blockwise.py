"""Causal attention of many queries over many keys, by heads or in the latent space, without storing all scores.

Keys are processed in blocks with a running maximum and running sums (online softmax), so the result is exact.
Letters: B batch, H heads, L queries, Q size of a query, V size of a value, G rows of q per token.
Source: Rabe and Staats 2021 (https://arxiv.org/abs/2112.05682), Dao et al. 2022 (https://arxiv.org/abs/2205.14135).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from kimi_mlx.model.device import elementwise
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

    def reshape(self, *shape: int) -> SoftmaxState:
        """Return the state with other dimensions of the queries: (*shape, 1) and (*shape, V)."""
        return SoftmaxState(*(part.reshape(*shape, -1) for part in self))

    def result(self, dtype: mx.Dtype) -> mx.array:
        """Return the attention: the mean of the values."""
        return (self.values / self.total).astype(dtype)


def attend_all(q: mx.array, rows: mx.array, expand: Expand, key_block: int) -> SoftmaxState:
    """Attend to all rows with every query, block by block as in `attend`.

    Args:
        q: (B, H, L, Q), scaled.
        rows: (B, 1, T, R + P), rows of the cache.
        expand: function from rows to keys and values.
        key_block: number of rows whose scores exist at once.
    """
    sums = None
    for start in range(0, rows.shape[2], key_block):
        sums = _add(sums, q, *expand(_after(sums, rows[:, :, start : start + key_block])))
    assert sums is not None
    return sums


def softmax_state(scores: mx.array, values: mx.array, least_peak: mx.array | None = None) -> SoftmaxState:
    """Return the state of queries with these scores.

    Args:
        scores: (B, H, L, T), masked.
        values: (B, H, T, V).
        least_peak: lower limit of the peak, (B, H, L, 1), if any.
    """
    scores = scores.astype(mx.float32)
    peak = scores.max(axis=-1, keepdims=True)
    if least_peak is not None:
        peak = mx.maximum(peak, least_peak)
    weights = mx.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    return SoftmaxState(peak, total, (weights.astype(values.dtype) @ values).astype(mx.float32))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """Return the state over the keys of both; each query has at least one key that it sees in each."""
    return SoftmaxState(*_merged(*a, *b))


@elementwise
def _merged(
    peak_a: mx.array, total_a: mx.array, values_a: mx.array, peak_b: mx.array, total_b: mx.array, values_b: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    peak = mx.maximum(peak_a, peak_b)
    a, b = mx.exp(peak_a - peak), mx.exp(peak_b - peak)
    return peak, a * total_a + b * total_b, a * values_a + b * values_b


def attend(
    q: mx.array,
    rows: mx.array,
    expand: Expand,
    mask: mx.array,
    rows_per_token: int = 1,
    key_block: int | None = None,
    before: SoftmaxState | None = None,
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
        before: state of the queries over earlier keys, which all of them see, if there are any.

    Returns:
        (B, H, L * G, V) in q's dtype.
    """
    length, total = q.shape[2] // rows_per_token, rows.shape[2]
    past, key_block = total - length, key_block or KEY_BLOCK
    sums = before
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
        outputs.append(final.result(q.dtype))
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
    if sums is None:
        return softmax_state(scores, v)
    new = softmax_state(scores, v, sums.peak)
    shrink = mx.exp(sums.peak - new.peak)
    return SoftmaxState(new.peak, new.total + shrink * sums.total, new.values + shrink * sums.values)
