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

GROUP_MAX_KEYS = 512
"""The caches of sequences up to this length are copied side by side: cheaper than a few kernels for each of them."""

GROUP_MAX_PADDING = 64
"""Of sequences whose lengths differ by no more than this."""


class Segment:
    """The tokens of one sequence in a step: `length` new ones after `offset` in its cache.

    Attributes:
        start, stop: where they are in the step.
        total: tokens in the cache with the new ones.
    """

    def __init__(self, offset: int, length: int, start: int):
        self.offset, self.length, self.total = offset, length, offset + length
        self.start, self.stop = start, start + length

    @cached_property
    def diagonal(self) -> mx.array:
        """The mask that kimi_mlx.model.blockwise.attend takes, float32."""
        return causal_mask(QUERY_BLOCK, max(QUERY_BLOCK, self.length), mx.float32)


class DecodeGroup:
    """Neighbouring segments that attend in the latent space at once: N of one token each, or one of some.

    Args:
        number: of the first segment's sequence.
        segment: the first.

    Attributes:
        numbers: of the sequences.
        start, stop: where their tokens are in the step.
        total: T, of the longest; the others' keys are padded up to it.
    """

    def __init__(self, number: int, segment: Segment):
        self.numbers, self._totals = [number], [segment.total]
        self.start, self.stop, self.total = segment.start, segment.stop, segment.total
        self._length = segment.length
        self._masks: dict[tuple[int, mx.Dtype], mx.array] = {}

    def add(self, number: int, segment: Segment) -> bool:
        """Take the next segment; False if it does not fit."""
        totals = [*self._totals, segment.total]
        is_single = self._length == segment.length == 1
        if not is_single or max(totals) > min(GROUP_MAX_KEYS, min(totals) + GROUP_MAX_PADDING):
            return False
        self.numbers.append(number)
        self._totals, self.stop, self.total = totals, segment.stop, max(totals)
        return True

    def mask(self, heads: int, dtype: mx.Dtype) -> mx.array:
        """Additive mask for scores (N, 1, length * H, T) with the heads of each query in turn; (1,) if all see all."""
        if self._length == 1 and min(self._totals) == self.total:
            return no_mask(dtype)
        if (heads, dtype) not in self._masks:
            if self._length == 1:
                mask = additive(mx.arange(self.total) < mx.array(self._totals)[:, None, None, None], dtype)
            else:
                mask = mx.repeat(causal_mask(self._length, self.total, dtype), heads, axis=0)
            self._masks[heads, dtype] = mask
        return self._masks[heads, dtype]


class BatchLayout:
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
        self.length = self.num_absorbed_tokens = 0
        for offset, length in lengths:
            if length <= ABSORB_MAX_LENGTH and self.num_absorbed_tokens == self.length:
                self.num_absorbed_tokens += length
            self.segments.append(Segment(offset, length, self.length))
            self.length += length
        self.rotate = rope.at([(offset, length) for offset, length in lengths if length])
        self._rope = rope

    @cached_property
    def decode_groups(self) -> list[DecodeGroup]:
        """All segments that attend in the latent space; those of one token are the better stacked the more their
        neighbours are as long."""
        decode_groups: list[DecodeGroup] = []
        for number, segment in enumerate(self.segments):
            is_short = segment.length and segment.stop <= self.num_absorbed_tokens
            if is_short and not (decode_groups and decode_groups[-1].add(number, segment)):
                decode_groups.append(DecodeGroup(number, segment))
        return decode_groups

    def query_layout(self, counts: Sequence[int]) -> QueryLayout:
        """The step of the last of the new tokens alone.

        Args:
            counts: how many of each sequence; one at least in all.
        """
        return QueryLayout(self._rope, self.segments, counts)

    def select(self, x: mx.array) -> mx.array:
        """Of the tokens of the whole step, (B, L, ...), those of this one."""
        return x


class QueryLayout(BatchLayout):
    """The step of some of another's tokens.

    Args:
        rope: the model's.
        segments: of the other one.
        counts: how many tokens at the end of each.
    """

    def __init__(self, rope: Rope, segments: Sequence[Segment], counts: Sequence[int]):
        pairs = list(zip(segments, counts, strict=True))
        super().__init__(rope, [(segment.total - count, count) for segment, count in pairs])
        rows = [row for segment, count in pairs for row in range(segment.stop - count, segment.stop)]
        is_run = rows[-1] - rows[0] == len(rows) - 1
        self._rows = slice(rows[0], rows[-1] + 1) if is_run else mx.array(rows)

    def select(self, x: mx.array) -> mx.array:
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
    return additive(mx.arange(total)[None] <= mx.arange(total - length, total)[:, None], dtype)


def additive(visible: mx.array, dtype: mx.Dtype) -> mx.array:
    """A mask that is added to scores: 0 where a query sees the key, else -inf."""
    return mx.where(visible, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
