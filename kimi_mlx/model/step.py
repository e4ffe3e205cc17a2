"""What all layers of one forward pass share, computed once for them.

A step takes new tokens of one or several sequences, one behind the other. Letters: B batch, H heads, L tokens of the
step, T tokens in a sequence's cache with the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import mlx.core as mx

from kimi_mlx.model.rope import Rope
from kimi_mlx.model.sizes import QUERY_BLOCK

ABSORB_MAX_LENGTH = 8
"""Up to this many new tokens attend in the latent space: cheaper than expanding T cached tokens into heads."""


class Segment:
    """The tokens of one sequence in a step: `length` new ones after `offset` in its cache.

    Attributes:
        start, stop: where they are in the step.
    """

    def __init__(self, offset: int, length: int, start: int):
        self.offset, self.length = offset, length
        self.start, self.stop = start, start + length
        self._masks: dict[tuple[int, mx.Dtype], mx.array] = {}

    @cached_property
    def diagonal(self) -> mx.array:
        """The mask that kimi_mlx.model.blockwise.attend takes, float32."""
        return causal_mask(QUERY_BLOCK, max(QUERY_BLOCK, self.length), mx.float32)

    def mask(self, heads: int, dtype: mx.Dtype) -> mx.array:
        """Additive causal mask for scores with the heads of each query in turn: (length * H, T); (1,) for one."""
        if self.length == 1:
            return no_mask(dtype)
        if (heads, dtype) not in self._masks:
            mask = causal_mask(self.length, self.offset + self.length, dtype)
            self._masks[heads, dtype] = mx.repeat(mask, heads, axis=0)
        return self._masks[heads, dtype]


class Step:
    """New tokens of one or several sequences.

    Args:
        rope: the model's.
        lengths: of each sequence, tokens in the cache and new ones; none new is allowed.

    Attributes:
        segments: of each sequence.
        length: tokens in all.
        short: so many of them, from the start, are in segments that attend in the latent space.
        rotate: rotates queries and keys of the new tokens, (B, H, L, P), to their positions.
    """

    def __init__(self, rope: Rope, lengths: Sequence[tuple[int, int]]):
        self.segments: list[Segment] = []
        self.length = self.short = 0
        for offset, length in lengths:
            if length <= ABSORB_MAX_LENGTH and self.short == self.length:
                self.short += length
            self.segments.append(Segment(offset, length, self.length))
            self.length += length
        self.rotate = rope.at([(offset, length) for offset, length in lengths if length])
        self._rope = rope

    def last(self, counts: Sequence[int]) -> Asked:
        """The step of the last of the new tokens alone.

        Args:
            counts: how many of each sequence; one at least in all.
        """
        return Asked(self._rope, self.segments, counts)

    def pick(self, x: mx.array) -> mx.array:
        """Of the tokens of the whole step, (B, L, ...), those of this one."""
        return x


class Asked(Step):
    """The step of some of another's tokens.

    Args:
        rope: the model's.
        segments: of the other one.
        counts: how many tokens at the end of each.
    """

    def __init__(self, rope: Rope, segments: Sequence[Segment], counts: Sequence[int]):
        pairs = list(zip(segments, counts, strict=True))
        super().__init__(rope, [(segment.offset + segment.length - count, count) for segment, count in pairs])
        rows = [row for segment, count in pairs for row in range(segment.stop - count, segment.stop)]
        is_run = rows[-1] - rows[0] == len(rows) - 1
        self._rows = slice(rows[0], rows[-1] + 1) if is_run else mx.array(rows)

    def pick(self, x: mx.array) -> mx.array:
        """Of the tokens of the whole step, (B, L, ...), those of this one."""
        return x[:, self._rows]


@cache
def no_mask(dtype: mx.Dtype) -> mx.array:
    """Zero, (1,); kept, so that a decode step does not make it again."""
    zero = mx.zeros((1,), dtype)
    mx.eval(zero)
    return zero


def causal_mask(length: int, total: int, dtype: mx.Dtype) -> mx.array:
    """Additive mask (length, total): query i, the one at total - length + i, sees the keys up to itself."""
    visible = mx.arange(total)[None] <= mx.arange(total - length, total)[:, None]
    return mx.where(visible, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
