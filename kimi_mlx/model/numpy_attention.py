"""Attention in the latent space on the CPU of Linux, computed by NumPy.

MLX's wheel for Linux has the reference BLAS, which does one multiply-add per clock cycle (3e9 a second). NumPy has
OpenBLAS, ten times as fast on one core, and its exponential is 20 times as fast. The price: the inputs are evaluated
here, so this part of the graph is not lazy. kimi_mlx.model.device_traits.uses_numpy says when it pays.

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
        keys: (B, 1, T, R + P), rows of the cache; the last stop - start of them are those of the queries.
    """

    start: int
    stop: int
    keys: mx.array


def attend(q: mx.array, parts: Sequence[LatentQueries], latent_dim: int) -> mx.array:
    """Compute causal attention, each part to its own keys.

    Args:
        q: (B, L, H, R + P) float32, scaled.
        parts: parts that cover the L tokens in order.
        latent_dim: R.

    Returns:
        (B, L, H, R) float32. Temporary memory outside MLX: this array, the scores of one block
        (max(NUMPY_ROW_BLOCK, H) * NUMPY_KEY_BLOCK values), and the sums of one block of rows.
    """
    q = mx.contiguous(q)
    mx.eval(q, [part.keys for part in parts])
    queries = np.asarray(q)
    out = np.empty((*queries.shape[:-1], latent_dim), np.float32)
    # One thread: more would wait for each other in busy loops, also where ranks share a machine; and sums stay equal.
    with blas_threads().limit(limits=1, user_api="blas"):
        for part in parts:
            for batch, keys in enumerate(np.asarray(part.keys)[:, 0]):
                _attend(queries[batch, part.start : part.stop], keys, out[batch, part.start : part.stop])
    return mx.array(out)


def _attend(q: np.ndarray, keys: np.ndarray, out: np.ndarray) -> None:
    """Attend with the L queries (L, H, R + P) to keys (T, R + P); write the result to `out` (L, H, R)."""
    length, heads, width = q.shape
    tokens = max(1, NUMPY_ROW_BLOCK // heads)
    scores = np.empty(min(tokens, length) * heads * min(NUMPY_KEY_BLOCK, len(keys)), np.float32)
    for start in range(0, length, tokens):
        stop = min(start + tokens, length)
        rows, num_keys = (stop - start) * heads, len(keys) - length + stop
        sums = out[start:stop].reshape(rows, -1)
        _attend_block(q[start:stop].reshape(rows, width), keys[:num_keys], heads, scores, sums)


def _attend_block(q: np.ndarray, keys: np.ndarray, heads: int, buffer: np.ndarray, out: np.ndarray) -> None:
    """Attend with a block of rows (M, R + P), of the last M / H of the tokens, with a running softmax (see blockwise).

    Args:
        q: queries; the H rows of a token are adjacent.
        keys: (T, R + P); the last one is that of the last token.
        heads: H.
        buffer: memory for the scores.
        out: (M, R), the result.
    """
    rows, latent_dim = out.shape
    first = len(keys) - rows // heads  # position of the first token
    peak = total = None
    for start in range(0, len(keys), NUMPY_KEY_BLOCK):
        block = keys[start : start + NUMPY_KEY_BLOCK]
        scores = buffer[: rows * len(block)].reshape(rows, len(block))
        np.matmul(q, block.T, out=scores)
        if start + len(block) > first + 1:
            hidden = np.arange(start, start + len(block)) > np.arange(first, len(keys))[:, None]
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
    out /= total
