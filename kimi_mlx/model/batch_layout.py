"""Layout of a step: positions, segments and masks, computed once for all layers.

A step holds new tokens of one or several sequences, concatenated. Letters: B batch, H heads, L tokens of the
step, T tokens in a sequence's cache with the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import mlx.core as mx

from kimi_mlx.model.device_traits import CPU_TUNING, Tuning
from kimi_mlx.model.rope import Rope, consecutive_ranges
from kimi_mlx.model.sizes import QUERY_BLOCK

GROUP_MAX_PADDING = 64
"""Maximum difference in length of the sequences in one group."""


class Segment:
    """The tokens of one sequence in a step: `length` new ones after `offset` in its cache.

    Attributes:
        start, stop: range of these tokens in the step.
        total: number of tokens in the cache, with the new ones.
    """

    def __init__(self, offset: int, length: int, start: int):
        self.offset, self.length, self.total = offset, length, offset + length
        self.start, self.stop = start, start + length

    @cached_property
    def diagonal(self) -> mx.array:
        """Mask for kimi_mlx.model.blockwise.attend, float32."""
        return causal_mask(QUERY_BLOCK, max(QUERY_BLOCK, self.length), mx.float32)


class DecodeGroup:
    """Adjacent segments that attend in the latent space at once: N of one token each, or one of several tokens.

    Args:
        index: index of the first segment's sequence.
        segment: the first segment.
        max_keys: maximum length of caches that are stacked.

    Attributes:
        indices: indices of the sequences.
        segment: the first segment.
        start, stop: range of their tokens in the step.
        total: T of the longest sequence; the keys of the others are padded to it.
    """

    def __init__(self, index: int, segment: Segment, max_keys: int):
        self.indices, self.segment = [index], segment
        self._totals, self._max_keys = [segment.total], max_keys
        self.start, self.stop, self.total = segment.start, segment.stop, segment.total
        self._length = segment.length
        self._masks: dict[tuple[int, mx.Dtype], mx.array] = {}

    def add(self, index: int, segment: Segment) -> bool:
        """Add the next segment; return False if it does not fit."""
        totals = [*self._totals, segment.total]
        is_single = self._length == segment.length == 1
        if not is_single or max(totals) > min(self._max_keys, min(totals) + GROUP_MAX_PADDING):
            return False
        self.indices.append(index)
        self._totals, self.stop, self.total = totals, segment.stop, max(totals)
        return True

    def mask(self, heads: int, dtype: mx.Dtype) -> mx.array:
        """Return the additive mask for scores (N, 1, length * H, T), grouped by query; (1,) if nothing is masked."""
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
        rope: rotary embedding of the model.
        lengths: (cached, new) token counts of each sequence; new may be 0.
        tuning: constants of the device.
        positions: positions to which the new tokens are rotated, where the cache lacks earlier ones; None for those
            after the cached tokens.

    Attributes:
        segments: segment of each sequence.
        length: number of tokens of the step.
        num_absorbed_tokens: number of leading tokens whose segments attend in the latent space.
        rotate: rotates queries and keys of the new tokens, (B, H, L, P), to their positions.
    """

    def __init__(
        self,
        rope: Rope,
        lengths: Sequence[tuple[int, int]],
        tuning: Tuning = CPU_TUNING,
        positions: Sequence[int] | None = None,
    ):
        self.segments: list[Segment] = []
        self.length = self.num_absorbed_tokens = 0
        for offset, length in lengths:
            if self.num_absorbed_tokens == self.length and tuning.absorbs(offset, length):
                self.num_absorbed_tokens += length
            self.segments.append(Segment(offset, length, self.length))
            self.length += length
        ranges = [(offset, length) for offset, length in lengths if length]
        self.rotate = rope.at(ranges if positions is None else consecutive_ranges(positions))
        self._rope, self._tuning, self._positions = rope, tuning, positions

    @cached_property
    def decode_groups(self) -> list[DecodeGroup]:
        """Groups of segments that attend in the latent space; sequences sorted by length give fewer groups."""
        decode_groups: list[DecodeGroup] = []
        for index, segment in enumerate(self.segments):
            is_short = segment.length and segment.stop <= self.num_absorbed_tokens
            if is_short and not (decode_groups and decode_groups[-1].add(index, segment)):
                decode_groups.append(DecodeGroup(index, segment, self._tuning.stack_max_keys))
        return decode_groups

    def query_layout(self, counts: Sequence[int]) -> QueryLayout:
        """Return the layout of the final tokens of each sequence, as queries.

        Args:
            counts: number of final tokens of each sequence; at least one in total.
        """
        return QueryLayout(self._rope, self.segments, counts, self._tuning, self._positions)

    def select(self, x: mx.array) -> mx.array:
        """Select the tokens of this layout from those of the whole step, (B, L, ...)."""
        return x


class QueryLayout(BatchLayout):
    """The layout of some tokens of another layout.

    Args:
        rope: rotary embedding of the model.
        segments: segments of the other layout.
        counts: number of final tokens of each segment.
        tuning: constants of the device.
        positions: positions of all tokens of the other layout; None for those after the cached tokens.
    """

    def __init__(
        self,
        rope: Rope,
        segments: Sequence[Segment],
        counts: Sequence[int],
        tuning: Tuning = CPU_TUNING,
        positions: Sequence[int] | None = None,
    ):
        pairs = list(zip(segments, counts, strict=True))
        rows = [row for segment, count in pairs for row in range(segment.stop - count, segment.stop)]
        lengths = [(segment.total - count, count) for segment, count in pairs]
        super().__init__(rope, lengths, tuning, None if positions is None else [positions[row] for row in rows])
        is_contiguous = rows[-1] - rows[0] == len(rows) - 1
        self._rows = slice(rows[0], rows[-1] + 1) if is_contiguous else mx.array(rows)

    def select(self, x: mx.array) -> mx.array:
        """Select the tokens of this layout from those of the whole step, (B, L, ...)."""
        return x[:, self._rows]


@cache
def no_mask(dtype: mx.Dtype) -> mx.array:
    """Return zero, (1,); cached, so that decode steps reuse it."""
    zero = mx.zeros((1,), dtype)
    mx.eval(zero)
    return zero


def causal_mask(length: int, total: int, dtype: mx.Dtype) -> mx.array:
    """Return the additive mask (length, total): query i, at position total - length + i, sees the keys up to itself."""
    return additive(mx.arange(total)[None] <= mx.arange(total - length, total)[:, None], dtype)


def additive(visible: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return a mask to add to scores: 0 where a query sees the key, otherwise -inf."""
    return mx.where(visible, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
