"""Time of attention in the latent space and by heads, which decides between them. Does not import MLX.

In the latent space a query takes 2 R + P multiply-adds per key and head (K2: 1,088), by heads N + P + V (320). But by
heads each cached token is expanded into keys and values first, R (N + V) multiply-adds per head (131,072), whatever
the number of queries. At equal speeds K2's break-even on a long context is 131,072 / (1,088 - 320) = 170 queries.

Letters: H heads of the rank, N qk_nope_head_dim, P qk_rope_head_dim, R kv_lora_rank, V v_head_dim, L new tokens,
T tokens in the cache with the new ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from kimi_mlx.model.config import DecoderConfig
from kimi_mlx.model.device_traits import Tuning


@dataclass(frozen=True)
class AttentionShape:
    """Dimensions of a rank's attention.

    Args:
        heads: H.
        nope_dim: N.
        rope_dim: P.
        value_dim: V.
        latent_dim: R.
    """

    heads: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    latent_dim: int

    @classmethod
    def of(cls, config: DecoderConfig, heads: int) -> AttentionShape:
        """Return the dimensions of a model's attention, with some of its heads."""
        return cls(heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim, config.kv_lora_rank)

    @property
    def expansion(self) -> int:
        """Multiply-adds to expand a token into the keys and values of all heads, or to absorb a query."""
        return self.heads * self.latent_dim * (self.nope_dim + self.value_dim)

    @property
    def latent_pair(self) -> int:
        """Multiply-adds per query and key in the latent space."""
        return self.heads * (2 * self.latent_dim + self.rope_dim)

    @property
    def head_pair(self) -> int:
        """Multiply-adds per query and key by heads."""
        return self.heads * (self.nope_dim + self.rope_dim + self.value_dim)


@dataclass(frozen=True)
class AttentionCost:
    """Seconds of one layer's attention on a device.

    Args:
        shape: dimensions of the rank's attention.
        tuning: constants of the device.
    """

    shape: AttentionShape
    tuning: Tuning

    @cached_property
    def expand_s(self) -> float:
        """Seconds to expand a cached token into keys and values, or to absorb a query."""
        return 2 * self.shape.expansion / self.tuning.weight_flops

    @cached_property
    def latent_pair_s(self) -> float:
        """Seconds per query and key in the latent space."""
        return 2 * self.shape.latent_pair / self.tuning.latent_flops

    @cached_property
    def head_pair_s(self) -> float:
        """Seconds per query and key by heads."""
        return 2 * self.shape.head_pair / self.tuning.attention_flops

    @property
    def break_even(self) -> float:
        """Number of new tokens from which on attention by heads is faster on a long context; may be infinite."""
        saved_s = self.latent_pair_s - self.head_pair_s
        return math.inf if saved_s <= 0 else self.expand_s / saved_s

    def is_latent(self, offset: int, length: int) -> bool:
        """Return whether `length` new tokens after `offset` cached ones attend in the latent space.

        The projections of the new tokens cost the same either way: L queries are absorbed, or L tokens expanded. A
        single token always attends in the latent space, where it can share kernels with those of other sequences.
        """
        is_always = length == 1 or self.break_even == math.inf
        return is_always or length * (offset + length) <= offset * self.break_even

    def max_latent_queries(self, limit: int) -> int:
        """Return the largest number of new tokens, up to `limit`, that attend in the latent space on any context."""
        return max(1, int(min(limit, self.break_even)))
