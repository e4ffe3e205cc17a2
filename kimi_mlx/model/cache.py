"""The cache of multi-head latent attention: one tensor a layer.

A token takes kv_lora_rank + qk_rope_head_dim values: the normed latent, then the rotated key that all heads share.
`offset`, `state` and `trim` mean what they mean in mlx-lm's caches.
"""

from __future__ import annotations

import mlx.core as mx


class LatentCache:
    """Latents and rotated keys of the tokens seen, growing in steps."""

    step = 256
    """Tokens by which the buffer grows."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.offset = 0

    def append(self, rows: mx.array) -> None:
        """Take the rows of new tokens, (B, 1, L, R + P)."""
        start, end = self.offset, self.offset + rows.shape[2]
        if self.keys is None:
            self.keys = rows[:, :, :0]
        self._reserve(end)
        self.keys[:, :, start:end] = rows
        self.offset = end

    def fetch(self, length: int) -> mx.array:
        """So many rows from the first on, (B, 1, length, R + P); what lies behind `offset` is finite, and no more."""
        self._reserve(length)
        assert self.keys is not None
        return self.keys[:, :, :length]

    def _reserve(self, end: int) -> None:
        """Grow the buffer if it is shorter."""
        assert self.keys is not None
        batch, heads, size, width = self.keys.shape
        if end > size:
            fresh = mx.zeros((batch, heads, -(-end // self.step) * self.step - self.offset, width), self.keys.dtype)
            self.keys = mx.concatenate([self.keys[:, :, : self.offset], fresh], axis=2)

    def copy(self, other: LatentCache, length: int) -> None:
        """Hold the first tokens of another cache, of which it has as many."""
        assert other.keys is not None
        self.keys, self.offset = other.keys[:, :, :length], length

    def trim(self, n: int) -> int:
        """Forget the last n tokens; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    @property
    def state(self) -> list[mx.array]:
        """The array to evaluate, so that a prefill chunk is really computed."""
        return [] if self.keys is None else [self.keys]
