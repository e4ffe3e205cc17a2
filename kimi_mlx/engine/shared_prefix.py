"""Prefixes whose rows several KV caches share: the common instructions of a hundred agents are in memory once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from kimi_mlx.model.cache import LatentCache, SharedRows

MIN_SHARED_TOKENS = 512
"""Minimum length of a shared prefix. A cache has up to 255 rows of padding, so with this length sharing never takes
more memory than a copy of the prefix."""

SHARED_STEP = 64
"""Lengths are multiples of this, so that a few tokens that two prompts share by chance do not split a group."""


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """The first tokens of several sequences, and their rows.

    Args:
        number: number in the order of creation, the same on all ranks.
        tokens: the tokens.
        layers: rows of each layer.
    """

    number: int
    tokens: list[int]
    layers: Sequence[SharedRows]

    @classmethod
    def of(cls, number: int, tokens: list[int], layers: Iterable[LatentCache]) -> SharedPrefix:
        """Return a prefix with the rows of a cache that begins with its tokens; they are copied, but not evaluated."""
        return cls(number, tokens, [SharedRows(_copy(layer.fetch(len(tokens)))) for layer in layers])

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.tokens)


def length_to_share(common: int, existing: int) -> int:
    """Return the length of a new prefix that is worth sharing; 0 if there is none.

    A longer prefix than an existing one must have more than twice its tokens, because sequences that share different
    prefixes do not attend to them together.

    Args:
        common: number of tokens that two sequences have in common.
        existing: length of the prefix that they share already.
    """
    length = common - common % SHARED_STEP
    return length if length >= 2 * existing + MIN_SHARED_TOKENS else 0


def _copy(rows: mx.array) -> mx.array:
    """Return a copy of rows (B, 1, T, R + P); a slice would keep the whole buffer in memory."""
    return mx.concatenate([rows[:, :, :1], rows[:, :, 1:]], axis=2)
