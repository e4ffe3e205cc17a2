"""Samplers: temperature, min-p, top-k and top-p, with random numbers that depend only on the seed and the position.

The order is vLLM's: first the temperature, then min-p, top-k and top-p, each applied to the tokens that remain.
Source: Sampler.sample and apply_top_k_top_p in vLLM's vllm/v1/sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx

from kimi_mlx.engine.request import Sampling

GREEDY_BELOW = 1e-6
"""Temperatures below this count as 0: dividing by them overflows, and the result is greedy anyway."""


class Sampler:
    """Samples the tokens of one sequence.

    A token depends only on its logits, the seed and its position. An answer that is restarted in the middle therefore
    continues as before, and a token does not depend on whether it was sampled alone or to verify a draft.

    Args:
        sampling: sampling parameters; their seed is not used.
        seed: seed of the random numbers, the same on every rank that samples.
    """

    def __init__(self, sampling: Sampling, seed: int):
        self._sampling, self._seed = sampling, seed

    def __call__(self, logits: mx.array, position: int) -> mx.array:
        """Sample a token from each row of logits.

        Args:
            logits: (n, vocab_size), of n consecutive positions; -inf for forbidden tokens.
            position: position in the sequence of the first sampled token.

        Returns:
            (n,) integers.
        """
        return sample_rows(logits, self._sampling, self.row_seeds(position, logits.shape[0]))

    def row_seeds(self, position: int, count: int) -> list[int]:
        """Return the seeds of the random numbers of consecutive positions."""
        return [_mixed(self._seed, position + row) for row in range(count)]


def sample_rows(logits: mx.array, sampling: Sampling, seeds: Sequence[int]) -> mx.array:
    """Sample a token from each row of logits, (n,) integers. Rows may belong to different sequences.

    Args:
        logits: (n, vocab_size); -inf for forbidden tokens.
        sampling: sampling parameters of all rows; their seed is not used.
        seeds: seed of each row's random numbers, at least one.
    """
    if sampling.temperature < GREEDY_BELOW:
        return mx.argmax(logits, axis=-1)
    scaled = logits.astype(mx.float32) * (1 / sampling.temperature)
    kept = keep_likely(scaled - mx.logsumexp(scaled, axis=-1, keepdims=True), sampling)
    # The largest sum of a logit and Gumbel noise is a sample of the softmax (Gumbel 1954).
    shape = logits.shape[1:]
    keys = [mx.random.key(seed) for seed in seeds]
    if len(keys) == 1:
        noise = mx.random.gumbel(shape, key=keys[0])[None]
    else:
        noise = mx.vmap(lambda key: mx.random.gumbel(shape, key=key))(mx.stack(keys))
    return mx.argmax(kept + noise, axis=-1)


def keep_likely(logprobs: mx.array, sampling: Sampling) -> mx.array:
    """Return log probabilities with -inf for the tokens that min_p, top_k or top_p remove.

    Each filter has a threshold, so tokens of equal probability are kept or removed together. top_p refers to the
    distribution over the tokens that min_p and top_k keep.

    Args:
        logprobs: (n, vocab_size) float32, at the temperature of `sampling`.
        sampling: sampling parameters.
    """
    vocab_size = logprobs.shape[-1]
    has_top_k, has_top_p = 0 < sampling.top_k < vocab_size, sampling.top_p < 1
    threshold = mx.array(-mx.inf)
    if sampling.min_p:
        threshold = logprobs.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
    if has_top_k or has_top_p:
        ascending = mx.sort(logprobs, axis=-1)
        if has_top_k:
            threshold = mx.maximum(threshold, ascending[:, vocab_size - sampling.top_k, None])
        if has_top_p:
            ascending = mx.where(ascending < threshold, -mx.inf, ascending)
            threshold = _top_p_threshold(ascending, sampling.top_p)
    elif not sampling.min_p:
        return logprobs
    return mx.where(logprobs < threshold, -mx.inf, logprobs)


def _top_p_threshold(ascending: mx.array, top_p: float) -> mx.array:
    """Return the smallest log probability, (n, 1), of the most likely tokens with a total probability of top_p."""
    probabilities = mx.exp(ascending)
    above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = above[:, :1] + probabilities[:, :1]
    num_removed = (above >= top_p * total).sum(axis=-1, keepdims=True)
    return mx.take_along_axis(ascending, num_removed, axis=-1)


def _mixed(seed: int, position: int) -> int:
    """Mix seed and position into 64 bits with a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
