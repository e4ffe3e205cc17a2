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

    def update_and_fetch(self, rows: mx.array) -> mx.array:
        """Append rows (B, 1, L, R + P) and return all: (B, 1, offset, R + P)."""
        start, end = self.offset, self.offset + rows.shape[2]
        if self.keys is None or end > self.keys.shape[2]:
            self._grow(rows, start, end)
        assert self.keys is not None
        self.keys[:, :, start:end] = rows
        self.offset = end
        return self.keys[:, :, :end]

    def _grow(self, rows: mx.array, start: int, end: int) -> None:
        size = -(-end // self.step) * self.step
        batch, heads, _, width = rows.shape
        fresh = mx.zeros((batch, heads, size - start, width), dtype=rows.dtype)
        self.keys = fresh if self.keys is None else mx.concatenate([self.keys[:, :, :start], fresh], axis=2)

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
