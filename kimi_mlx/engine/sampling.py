"""Samplers: mlx-lm's, and argmax for greedy decoding."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import mlx.core as mx

from kimi_mlx.engine.request import Sampling

Sampler = Callable[[mx.array], mx.array]
"""Function from logits (B, vocab_size) to token ids (B)."""

SeededSampler = Callable[[mx.array, int], mx.array]
"""Function from logits (B, vocab_size) and the position of the token in its sequence to token ids (B)."""


GREEDY_BELOW = 1e-6
"""Temperatures below this count as 0: dividing by them overflows, and the result is greedy anyway."""


def make_sampler(sampling: Sampling, vocab_size: int) -> Sampler:
    """Return the function from logits (B, vocab_size) to token ids (B).

    It uses MLX's global random state, which must be seeded with the same value on every rank.
    """
    if sampling.temperature < GREEDY_BELOW:
        return lambda logits: mx.argmax(logits, axis=-1)
    sample = samplers().make_sampler(
        temp=sampling.temperature,
        top_p=sampling.top_p if sampling.top_p < 1 else 0.0,
        min_p=sampling.min_p,
        top_k=sampling.top_k if sampling.top_k < vocab_size else 0,
    )

    def from_logits(logits: mx.array) -> mx.array:
        logits = logits.astype(mx.float32)
        return sample(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    return from_logits


def samplers() -> ModuleType:
    """Return mlx-lm's samplers. Importing them takes 2 s, so greedy decoding does without."""
    return importlib.import_module("mlx_lm.sample_utils")


def seeded(sample: Sampler, seed: int | None) -> SeededSampler:
    """Return a sampler whose random numbers depend only on the seed and the position of the token.

    An answer that is restarted in the middle therefore continues as before, and a token does not depend on whether it
    was sampled alone or to verify a draft.
    """

    def sample_at(logits: mx.array, position: int) -> mx.array:
        if seed is not None:
            mx.random.seed(_mixed(seed, position))
        return sample(logits)

    return sample_at


def _mixed(seed: int, position: int) -> int:
    """Mix seed and position into 64 bits with a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
