"""The KV cache of multi-head latent attention: one tensor per layer.

A token has kv_lora_rank + qk_rope_head_dim values: the normed latent, then the rotated key that all heads share.
`offset`, `state` and `trim` are those of mlx-lm's caches. Letters: B batch, L new tokens, N sequences, R kv_lora_rank,
P qk_rope_head_dim.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import mlx.core as mx

STEP = 256
"""Number of tokens by which buffers grow."""


class SharedRows:
    """Rows of one layer for the first tokens of several sequences. No cache changes them.

    Args:
        keys: (B, 1, T, R + P).
    """

    def __init__(self, keys: mx.array):
        self.keys = keys
        self.length: int = keys.shape[2]


class LatentCache:
    """Latents and rotated keys of the tokens so far.

    They are in a buffer that grows in steps, or in a row of a KeyStack; those of the first tokens may be shared.
    """

    step = STEP

    def __init__(self) -> None:
        self._keys: mx.array | None = None
        self._stack: KeyStack | None = None
        self._row = 0
        self.offset = 0
        self.shared: SharedRows | None = None

    @property
    def num_shared(self) -> int:
        """Number of tokens whose rows are shared with other caches."""
        return 0 if self.shared is None else self.shared.length

    @property
    def num_own(self) -> int:
        """Number of tokens whose rows are in the buffer."""
        return self.offset - self.num_shared

    @property
    def keys(self) -> mx.array | None:
        """The buffer, (B, 1, at least `num_own` tokens, R + P). Setting it takes the cache out of its stack."""
        if self._stack is not None:
            return self._stack.rows[self._row : self._row + 1, None]
        return self._keys

    @keys.setter
    def keys(self, keys: mx.array | None) -> None:
        self._keys, self._stack = keys, None

    @property
    def stack(self) -> KeyStack | None:
        """The stack that holds the buffer, if any."""
        return self._stack

    def move_to(self, stack: KeyStack, row: int) -> None:
        """Use a row of a stack, which has a copy of the buffer."""
        self._keys, self._stack, self._row = None, stack, row

    def append(self, rows: mx.array) -> None:
        """Append the rows of new tokens, (B, 1, L, R + P)."""
        start, end = self.num_own, self.num_own + rows.shape[2]
        if self.keys is None:
            self.keys = rows[:, :, :0]
        keys = self.fetch_buffer(end)
        keys[:, :, start:end] = rows
        self.keys, self.offset = keys, self.offset + rows.shape[2]

    def fetch(self, length: int) -> mx.array:
        """Return the first `length` rows, (B, 1, length, R + P). Rows from `offset` on are finite but meaningless.

        With shared rows this is a copy.
        """
        if self.shared is None:
            return self.fetch_own(length)
        num_own = length - self.shared.length
        if num_own <= 0:
            return self.shared.keys[:, :, :length]
        return mx.concatenate([self.shared.keys, self.fetch_own(num_own)], axis=2)

    def rows_between(self, start: int, stop: int) -> mx.array:
        """Return the rows of some tokens, (B, 1, stop - start, R + P), without a copy of the others."""
        if self.shared is None or start >= self.shared.length:
            return self.fetch_own(stop - self.num_shared)[:, :, start - self.num_shared :]
        first = self.shared.keys[:, :, start:stop]
        if stop <= self.shared.length:
            return first
        return mx.concatenate([first, self.fetch_own(stop - self.shared.length)], axis=2)

    def fetch_own(self, length: int) -> mx.array:
        """Return the first `length` rows after the shared ones."""
        return self.fetch_buffer(length)[:, :, :length]

    def fetch_buffer(self, end: int) -> mx.array:
        """Return the buffer, with space for at least `end` tokens."""
        keys = self.keys
        assert keys is not None
        batch, heads, size, width = keys.shape
        if end > size:
            fresh = mx.zeros((batch, heads, -(-end // STEP) * STEP - self.num_own, width), keys.dtype)
            keys = self.keys = mx.concatenate([keys[:, :, : self.num_own], fresh], axis=2)
        return keys

    def copy(self, other: LatentCache, length: int, shared: SharedRows | None = None) -> None:
        """Replace the contents with the first `length` tokens of a cache, which must have as many.

        Args:
            other: the cache; it may be this one.
            length: number of tokens.
            shared: rows of the first of these tokens, to be shared instead of copied.
        """
        start = 0 if shared is None else shared.length
        keys = other.fetch_own(length - start) if other.num_shared == start else other.fetch(length)[:, :, start:]
        self.shared, self.keys, self.offset = shared, keys, length

    def trim(self, n: int) -> int:
        """Remove the last n tokens; return the number of removed tokens."""
        n = min(self.offset, n)
        self.offset -= n
        if self.offset < self.num_shared:
            self.keys, self.shared = self.fetch(self.offset), None
        return n

    @property
    def state(self) -> list[mx.array]:
        """Arrays to evaluate, so that a prefill chunk is computed."""
        return [] if self.keys is None else [self.keys]


class KeyStack:
    """The buffers of sequences that attend together, in one array, so that a step neither copies nor visits each.

    Rows that the sequences share are not in it.

    On a GPU each operation is a dispatch: appending to 16 caches and stacking them takes 32 a layer, a stack takes one.

    Args:
        caches: caches of N sequences of batch 1, which become its rows.
        size: number of tokens per row.
    """

    def __init__(self, caches: Sequence[LatentCache], size: int):
        earlier = {cache.stack for cache in caches if cache.stack is not None}
        self.rows = mx.concatenate([cache.fetch_buffer(size)[:, 0, :size] for cache in caches], axis=0)
        """(N, size, R + P)"""
        for row, cache in enumerate(caches):
            cache.move_to(self, row)
        self._members = [weakref.ref(cache) for cache in caches]
        left = [member for stack in earlier for member in stack.members if member.stack is stack]
        for cache in left:  # a single row would keep its whole stack in memory
            assert cache.keys is not None
            cache.keys = mx.contiguous(cache.keys)
        mx.async_eval([cache.state for cache in left])

    @property
    def members(self) -> list[LatentCache]:
        """The caches that still exist."""
        return [cache for reference in self._members if (cache := reference()) is not None]

    def holds(self, caches: Sequence[LatentCache]) -> bool:
        """Return whether the rows are those of these caches, in this order."""
        return len(caches) == self.rows.shape[0] and self.first_row(caches) == 0

    def first_row(self, caches: Sequence[LatentCache]) -> int | None:
        """Return the row of the first of these caches; None unless they are adjacent rows in this order."""
        members = [reference() for reference in self._members]
        first = next((row for row, member in enumerate(members) if member is caches[0]), len(members))
        adjacent = members[first : first + len(caches)]
        is_here = len(adjacent) == len(caches) and all(
            cache.stack is self and member is cache for cache, member in zip(caches, adjacent, strict=True)
        )
        return first if is_here else None


def append_together(caches: Sequence[LatentCache], rows: mx.array, where: tuple[mx.array, mx.array]) -> None:
    """Append equally many new tokens to each of several caches, in a stack.

    Args:
        caches: caches of N sequences of batch 1.
        rows: (N, L, R + P).
        where: index of the sequence, (N, 1), and number of tokens before each new one in its buffer, (N, L).
    """
    end = max(cache.num_own for cache in caches) + rows.shape[1]
    stack = caches[0].stack
    if stack is None or not stack.holds(caches) or stack.rows.shape[1] < end:
        for cache in caches:
            if cache.keys is None:
                cache.keys = mx.zeros((1, 1, 0, rows.shape[2]), rows.dtype)
        stack = KeyStack(caches, -(-end // STEP) * STEP)
    index, positions = where
    stack.rows[index, positions] = rows
    for cache in caches:
        cache.offset += rows.shape[1]


def fetch_together(caches: Sequence[LatentCache], length: int) -> mx.array:
    """Return the first `length` own rows of several caches, (B * N, 1, length, R + P); without a copy from a stack."""
    stack = caches[0].stack
    first = None if stack is None or stack.rows.shape[1] < length else stack.first_row(caches)
    if stack is not None and first is not None:
        return stack.rows[first : first + len(caches), None, :length]
    parts = [cache.fetch_own(length) for cache in caches]
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=0)
