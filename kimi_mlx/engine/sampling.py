"""From logits to a token: mlx-lm's samplers, and argmax where nothing is random."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import mlx.core as mx

from kimi_mlx.engine.request import Sampling

Sampler = Callable[[mx.array], mx.array]
"""From logits (B, vocab_size) to token ids (B)."""

Draw = Callable[[mx.array, int], mx.array]
"""The same for the token at a position of its sequence."""


GREEDY_BELOW = 1e-6
"""Temperatures at which dividing by them would overflow; the text is the likeliest one there anyway."""


def make_sampler(sampling: Sampling, vocab_size: int) -> Sampler:
    """Return the function from logits (B, vocab_size) to token ids (B).

    It draws from MLX's global random state; seed that on every rank alike.
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
    """mlx-lm's samplers; importing them takes 2 s, so greedy text goes without."""
    return importlib.import_module("mlx_lm.sample_utils")


def seeded(sample: Sampler, seed: int | None) -> Draw:
    """Draw with random numbers that depend on nothing but the seed and the position of the token.

    So an answer that is begun anew in the middle goes on as it would have, and a token is the same whether it was
    drawn alone or to check a draft.
    """

    def draw(logits: mx.array, position: int) -> mx.array:
        if seed is not None:
            mx.random.seed(_mixed(seed, position))
        return sample(logits)

    return draw


def _mixed(seed: int, position: int) -> int:
    """64 bits from both: a step of SplitMix64 (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
