"""The KV cache of multi-head latent attention: one tensor per layer.

A token has kv_lora_rank + qk_rope_head_dim values: the normed latent, then the rotated key that all heads share.
`offset`, `state` and `trim` are those of mlx-lm's caches. Letters: B batch, L new tokens, R kv_lora_rank,
P qk_rope_head_dim.
"""

from __future__ import annotations

import mlx.core as mx


class LatentCache:
    """Latents and rotated keys of the tokens so far, in a buffer that grows in steps."""

    step = 256
    """Number of tokens by which the buffer grows."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.offset = 0

    def append(self, rows: mx.array) -> None:
        """Append the rows of new tokens, (B, 1, L, R + P)."""
        start, end = self.offset, self.offset + rows.shape[2]
        if self.keys is None:
            self.keys = rows[:, :, :0]
        self._reserve(end)
        self.keys[:, :, start:end] = rows
        self.offset = end

    def fetch(self, length: int) -> mx.array:
        """Return the first `length` rows, (B, 1, length, R + P). Rows from `offset` on are finite but meaningless."""
        self._reserve(length)
        assert self.keys is not None
        return self.keys[:, :, :length]

    def _reserve(self, end: int) -> None:
        """Grow the buffer to at least `end` tokens."""
        assert self.keys is not None
        batch, heads, size, width = self.keys.shape
        if end > size:
            fresh = mx.zeros((batch, heads, -(-end // self.step) * self.step - self.offset, width), self.keys.dtype)
            self.keys = mx.concatenate([self.keys[:, :, : self.offset], fresh], axis=2)

    def copy(self, other: LatentCache, length: int) -> None:
        """Replace the contents with the first `length` tokens of another cache, which must have as many."""
        assert other.keys is not None
        self.keys, self.offset = other.keys[:, :, :length], length

    def trim(self, n: int) -> int:
        """Remove the last n tokens; return the number of removed tokens."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    @property
    def state(self) -> list[mx.array]:
        """Arrays to evaluate, so that a prefill chunk is computed."""
        return [] if self.keys is None else [self.keys]
