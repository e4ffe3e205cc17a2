"""Attention in the latent space on the CPU of Linux, computed by NumPy.

MLX's wheel for Linux has the reference BLAS, which does one multiply-add per clock cycle (3e9 a second). NumPy has
OpenBLAS, ten times as fast on one core, and its exponential is 20 times as fast. The price: the inputs are evaluated
here, so this part of the graph is not lazy. kimi_mlx.model.device_traits.uses_numpy decides when it pays off.

Letters: B batch, L new tokens, H heads, T tokens in the cache, R kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from kimi_mlx.model.sizes import NUMPY_KEY_BLOCK, NUMPY_ROW_BLOCK

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController


@cache
def blas_threads() -> ThreadpoolController:
    """Return the controller of NumPy's BLAS. Finding its library takes milliseconds, so it is kept."""
    from threadpoolctl import ThreadpoolController  # installed on Linux only

    return ThreadpoolController()


class LatentQueries(NamedTuple):
    """Queries that attend to one cache.

    Args:
        start, stop: range of the tokens among all queries.
        keys: (B, 1, T, R + P), rows of the cache that are not shared; the last stop - start of them are those of the
            queries.
    """

    start: int
    stop: int
    keys: mx.array


def attend(q: mx.array, parts: Sequence[LatentQueries], latent_dim: int, shared: mx.array | None = None) -> mx.array:
    """Compute causal attention, each part to its own keys, after those that all parts share.

    Args:
        q: (B, L, H, R + P) float32, scaled.
        parts: parts that cover the L tokens in order.
        latent_dim: R.
        shared: (1, 1, T, R + P), rows of a prefix of all caches, if they share one; B is 1 then.

    Returns:
        (B, L, H, R) float32. Temporary memory outside MLX: this array, the scores of one block
        (max(NUMPY_ROW_BLOCK, H) * NUMPY_KEY_BLOCK values), and the sums of one block of rows.
    """
    q = mx.contiguous(q)
    mx.eval(q, [part.keys for part in parts], *([] if shared is None else [shared]))
    queries = np.asarray(q)
    out = np.empty((*queries.shape[:-1], latent_dim), np.float32)
    # One thread: more would wait for each other in busy loops, also where ranks share a machine; and sums stay equal.
    with blas_threads().limit(limits=1, user_api="blas"):
        sums = None if shared is None else _attend_shared(queries[0], np.asarray(shared)[0, 0], out[0])
        for part in parts:
            before = None if sums is None else sums.tokens(part.start, part.stop)
            for batch, keys in enumerate(np.asarray(part.keys)[:, 0]):
                _attend(queries[batch, part.start : part.stop], keys, out[batch, part.start : part.stop], before)
    return mx.array(out)


class Sums(NamedTuple):
    """Running softmax of some tokens, without the sums of the values, which are in the output array.

    Args:
        peak: (L, H, 1), largest scores.
        total: (L, H, 1), sums of exp(score - peak).
    """

    peak: np.ndarray
    total: np.ndarray

    def tokens(self, start: int, stop: int) -> Sums:
        """Return the sums of some tokens."""
        return Sums(self.peak[start:stop], self.total[start:stop])

    def rows(self) -> Sums:
        """Return the sums with a row per token and head, (L * H, 1)."""
        return Sums(self.peak.reshape(-1, 1), self.total.reshape(-1, 1))


def _attend_shared(q: np.ndarray, keys: np.ndarray, out: np.ndarray) -> Sums:
    """Attend with queries (L, H, R + P) to all keys (T, R + P); write the sums of values to `out` (L, H, R)."""
    length, heads, width = q.shape
    peak, total = np.empty((length, heads, 1), np.float32), np.empty((length, heads, 1), np.float32)
    tokens = max(1, NUMPY_ROW_BLOCK // heads)
    buffer = np.empty(min(tokens, length) * heads * min(NUMPY_KEY_BLOCK, len(keys)), np.float32)
    for start in range(0, length, tokens):
        block = slice(start, start + tokens)
        sums = out[block].reshape(-1, out.shape[-1])
        end = _add_keys(q[block].reshape(-1, width), keys, heads, buffer, sums, len(keys), None)
        peak[block], total[block] = end.peak.reshape(-1, heads, 1), end.total.reshape(-1, heads, 1)
    return Sums(peak, total)


def _attend(q: np.ndarray, keys: np.ndarray, out: np.ndarray, before: Sums | None) -> None:
    """Attend with the L queries (L, H, R + P) to keys (T, R + P); write the result to `out` (L, H, R).

    Args:
        q: queries.
        keys: keys.
        out: result; on entry the sums of the values of earlier keys, if `before` is given.
        before: sums of earlier keys, if there are any.
    """
    length, heads, width = q.shape
    tokens = max(1, NUMPY_ROW_BLOCK // heads)
    scores = np.empty(min(tokens, length) * heads * min(NUMPY_KEY_BLOCK, len(keys)), np.float32)
    for start in range(0, length, tokens):
        stop = min(start + tokens, length)
        rows, num_keys = (stop - start) * heads, len(keys) - length + stop
        sums = out[start:stop].reshape(rows, -1)
        first = num_keys - (stop - start)  # position of the first token
        earlier = None if before is None else before.tokens(start, stop).rows()
        queries = q[start:stop].reshape(rows, width)
        sums /= _add_keys(queries, keys[:num_keys], heads, scores, sums, first, earlier).total


def _add_keys(
    q: np.ndarray,
    keys: np.ndarray,
    heads: int,
    buffer: np.ndarray,
    out: np.ndarray,
    first: int,
    before: Sums | None,
) -> Sums:
    """Add keys to the running softmax of a block of rows (M, R + P); see kimi_mlx.model.blockwise.

    Args:
        q: queries; the H rows of a token are adjacent.
        keys: (T, R + P).
        heads: H.
        buffer: memory for the scores.
        out: (M, R), sums of the values; the content on entry is used only if `before` is given.
        first: position of the first token among the keys; it sees those up to itself.
        before: sums of earlier keys, if there are any.

    Returns:
        The sums with these keys.
    """
    rows, latent_dim = out.shape
    peak, total = (None, None) if before is None else before
    for start in range(0, len(keys), NUMPY_KEY_BLOCK):
        block = keys[start : start + NUMPY_KEY_BLOCK]
        scores = buffer[: rows * len(block)].reshape(rows, len(block))
        np.matmul(q, block.T, out=scores)
        if start + len(block) > first + 1:
            hidden = np.arange(start, start + len(block)) > np.arange(first, first + rows // heads)[:, None]
            np.copyto(scores.reshape(-1, heads, len(block)), -np.inf, where=hidden[:, None])
        new_peak = scores.max(axis=1, keepdims=True)
        if peak is not None:
            new_peak = np.maximum(peak, new_peak)
        scores -= new_peak
        np.exp(scores, out=scores)
        if peak is None:
            total = scores.sum(axis=1, keepdims=True)
            np.matmul(scores, block[:, :latent_dim], out=out)
        else:
            shrink = np.exp(peak - new_peak)
            total = total * shrink + scores.sum(axis=1, keepdims=True)
            out *= shrink
            out += scores @ block[:, :latent_dim]
        peak = new_peak
    assert peak is not None
    assert total is not None
    return Sums(peak, total)
