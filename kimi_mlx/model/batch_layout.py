"""Layout of a step: positions, segments and masks, computed once for all layers.

A step holds new tokens of one or several sequences, concatenated. Letters: B batch, H heads, L tokens of the
step, T tokens in a sequence's cache with the new ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import NamedTuple

import mlx.core as mx

from kimi_mlx.model.attention_cost import AttentionCost
from kimi_mlx.model.cache import SharedRows
from kimi_mlx.model.rope import Rope, consecutive_ranges
from kimi_mlx.model.sizes import QUERY_BLOCK, SCORES_MAX

MIN_PADDING = 64
"""Difference in length that sequences in one group may always have."""


class Segment:
    """The tokens of one sequence in a step: `length` new ones after `offset` in its cache.

    Args:
        offset: number of cached tokens.
        length: number of new tokens.
        start: position of the first one in the step.
        shared: rows of the first tokens, in the first layer, if they are shared with other caches.

    Attributes:
        start, stop: range of these tokens in the step.
        total: number of tokens in the cache, with the new ones.
    """

    def __init__(self, offset: int, length: int, start: int, shared: SharedRows | None = None):
        self.offset, self.length, self.total, self.shared = offset, length, offset + length, shared
        self.start, self.stop = start, start + length

    @property
    def own(self) -> Segment:
        """The same tokens in the part of the cache that is not shared."""
        num_shared = 0 if self.shared is None else self.shared.length
        return Segment(self.offset - num_shared, self.length, self.start)

    @cached_property
    def diagonal(self) -> mx.array:
        """Mask for kimi_mlx.model.blockwise.attend, float32."""
        return causal_mask(QUERY_BLOCK, max(QUERY_BLOCK, self.length), mx.float32)


class DecodeGroup:
    """Adjacent segments of equal length that attend in the latent space at once.

    Args:
        index: index of the first segment's sequence.
        segment: the first segment.
        cost: cost of attention on the device.

    Attributes:
        indices: indices of the N sequences.
        segment: the first segment.
        start, stop: range of their tokens in the step.
        total: T of the longest sequence; the keys of the others are padded to it.
        offsets: number of cached tokens of each sequence, without the new ones.
    """

    def __init__(self, index: int, segment: Segment, cost: AttentionCost):
        self.indices, self.segment, self.offsets = [index], segment, [segment.offset]
        self.start, self.stop, self.total = segment.start, segment.stop, segment.total
        self._cost = cost
        self._masks: dict[tuple[int, mx.Dtype], mx.array] = {}

    def add(self, index: int, segment: Segment) -> bool:
        """Add the next segment; return False if it does not fit."""
        length, tuning = self.segment.length, self._cost.tuning
        offsets = [*self.offsets, segment.offset]
        shortest, total = min(offsets) + length, max(offsets) + length
        max_total = min(tuning.stack_max_keys, shortest + max(MIN_PADDING, int(shortest * tuning.stack_padding)))
        num_scores = len(offsets) * length * self._cost.shape.heads * total
        if segment.length != length or total > max_total or num_scores > SCORES_MAX:
            return False
        self.indices.append(index)
        self.offsets, self.stop, self.total = offsets, segment.stop, total
        return True

    @cached_property
    def order(self) -> mx.array:
        """Index of each sequence in the group, (N, 1) int32."""
        return mx.arange(len(self.indices))[:, None]

    @cached_property
    def positions(self) -> mx.array:
        """Number of own rows before each new one in its sequence, (N, length) int32."""
        return mx.array(self.offsets)[:, None] + mx.arange(self.segment.length)

    def mask(self, heads: int, dtype: mx.Dtype) -> mx.array:
        """Return the additive mask for scores (N, 1, length * H, T), grouped by query; (1,) if nothing is masked."""
        length = self.segment.length
        if length == 1 and min(self.offsets) + 1 == self.total:
            return no_mask(dtype)
        if (heads, dtype) not in self._masks:
            mask = additive(mx.arange(self.total) <= self.positions[:, None, :, None], dtype)
            self._masks[heads, dtype] = mask if length == 1 else mx.repeat(mask, heads, axis=2)
        return self._masks[heads, dtype]


class LatentRun:
    """Adjacent segments that attend in the latent space; their projections are computed at once.

    If the sequences share the rows of a prefix, all queries attend to these at once, and `groups` to the own rows.

    Args:
        start: position of the first token in the step.
        shared: rows of the common prefix in the first layer; None if the sequences share none.

    Attributes:
        start, stop: range of their tokens in the step.
        segments: (index of the sequence, segment) of each.
        groups: groups that attend at once; sequences sorted by length give fewer.
        num_pairs: number of pairs of a query and a key.
    """

    def __init__(self, start: int, shared: SharedRows | None = None):
        self.start, self.stop, self.shared = start, start, shared
        self.segments: list[tuple[int, Segment]] = []
        self.groups: list[DecodeGroup] = []
        self.num_pairs = 0

    def add(self, index: int, segment: Segment, cost: AttentionCost) -> None:
        """Add the next segment, which has at least one token."""
        self.stop = segment.stop
        self.segments.append((index, segment))
        self.num_pairs += segment.length * segment.total
        own = segment if self.shared is None else segment.own
        if not (self.groups and self.groups[-1].add(index, own)):
            self.groups.append(DecodeGroup(index, own, cost))


class HeadRun(NamedTuple):
    """A segment that attends by heads.

    Args:
        sequence: index of the sequence.
        segment: the segment.
    """

    sequence: int
    segment: Segment


class BatchLayout:
    """New tokens of one or several sequences.

    Args:
        rope: rotary embedding of the model.
        lengths: (cached, new) token counts of each sequence; new may be 0.
        cost: cost of attention on the device, which decides how each sequence attends.
        positions: positions to which the new tokens are rotated, where the cache lacks earlier ones; None for those
            after the cached tokens.
        shared: shared rows of each sequence in the first layer; None if there are none at all.

    Attributes:
        segments: segment of each sequence.
        length: number of tokens of the step.
        runs: the segments with new tokens by the kind of their attention, in order.
        share: this rank's queries if the ranks divide them; otherwise None.
        is_share: whether the tokens are the share of another layout.
        rotate: rotates queries and keys of the new tokens, (B, H, L, P), to their positions.
    """

    def __init__(
        self,
        rope: Rope,
        lengths: Sequence[tuple[int, int]],
        cost: AttentionCost,
        positions: Sequence[int] | None = None,
        shared: Sequence[SharedRows | None] | None = None,
    ):
        self.segments: list[Segment] = []
        self.runs: list[LatentRun | HeadRun] = []
        self.length = 0
        for index, (offset, length) in enumerate(lengths):
            segment = Segment(offset, length, self.length, None if shared is None else shared[index])
            self.segments.append(segment)
            self.length += length
            if length:
                self._add_to_runs(index, segment, cost)
        ranges = [(offset, length) for offset, length in lengths if length]
        self.rotate = rope.at(ranges if positions is None else consecutive_ranges(positions))
        self._rope, self._cost, self._positions = rope, cost, positions
        self._step_segments: Sequence[Segment] = self.segments
        self._first_rows = [segment.start for segment in self.segments]  # in the step, of each segment
        self.share: QueryShare | None = None
        self.is_share = False

    def _add_to_runs(self, index: int, segment: Segment, cost: AttentionCost) -> None:
        """Add a segment to the last run if both attend in the latent space, after the same prefix; else start a run."""
        if not cost.is_latent(segment.offset, segment.length):
            self.runs.append(HeadRun(index, segment))
            return
        last = self.runs[-1] if self.runs else None
        if not isinstance(last, LatentRun) or last.shared is not segment.shared:
            last = LatentRun(segment.start, segment.shared)
            self.runs.append(last)
        last.add(index, segment, cost)

    @cached_property
    def stacked_groups(self) -> list[DecodeGroup]:
        """Groups of several sequences whose caches are rows of one array."""
        groups = [group for run in self.runs if isinstance(run, LatentRun) for group in run.groups]
        return [group for group in groups if len(group.indices) > 1 and self._cost.tuning.keeps_stacks]

    @cached_property
    def separate_segments(self) -> list[tuple[int, Segment]]:
        """(index of the sequence, segment) of all others, including sequences without new tokens."""
        stacked = {index for group in self.stacked_groups for index in group.indices}
        return [(index, segment) for index, segment in enumerate(self.segments) if index not in stacked]

    def query_layout(self, counts: Sequence[int]) -> QueryLayout:
        """Return the layout of the final tokens of each sequence, as queries.

        Args:
            counts: number of final tokens of each sequence; at least one in total.
        """
        rows = [(segment.stop - count, count) for segment, count in zip(self.segments, counts, strict=True)]
        return QueryLayout(self._rope, self.segments, rows, self._cost, self._positions)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(cached, new) token counts of each sequence; in a layout of queries the new ones are queries."""
        return [(segment.offset, segment.length) for segment in self.segments]

    def divide(self, bounds: Sequence[int], rank: int) -> None:
        """Divide the tokens over ranks, as queries; set `share`.

        Args:
            bounds: the tokens of rank r are those from bounds[r] to bounds[r + 1] (excluded); no range is empty.
            rank: this rank.
        """
        start, stop = bounds[rank], bounds[rank + 1]
        rows: list[tuple[int, int]] = []
        for segment, first_row in zip(self.segments, self._first_rows, strict=True):
            first = min(max(start, segment.start), segment.stop)
            end = max(min(stop, segment.stop), first)
            rows.append((first_row + first - segment.start, end - first))
        layout = QueryLayout(self._rope, self._step_segments, rows, self._cost, self._positions)
        layout.is_share = True
        self.share = QueryShare(layout, tuple(bounds))

    def select(self, x: mx.array) -> mx.array:
        """Select the tokens of this layout from those of the whole step, (B, L, ...)."""
        return x


class QueryLayout(BatchLayout):
    """The layout of some tokens of a step, which are queries.

    Args:
        rope: rotary embedding of the model.
        segments: segments of the step.
        rows: (first row in the step, number of rows) of each segment; adjacent rows of a sequence, or none.
        cost: cost of attention on the device.
        positions: positions of all tokens of the step; None for those after the cached tokens.
    """

    def __init__(
        self,
        rope: Rope,
        segments: Sequence[Segment],
        rows: Sequence[tuple[int, int]],
        cost: AttentionCost,
        positions: Sequence[int] | None = None,
    ):
        pairs = list(zip(segments, rows, strict=True))
        selected = [row for first, count in rows for row in range(first, first + count)]
        lengths = [(segment.offset + first - segment.start, count) for segment, (first, count) in pairs]
        query_positions = None if positions is None else [positions[row] for row in selected]
        super().__init__(rope, lengths, cost, query_positions, [segment.shared for segment in segments])
        self._positions = positions
        self._step_segments, self._first_rows = segments, [first for first, _ in rows]
        is_contiguous = selected[-1] - selected[0] == len(selected) - 1
        self._rows = slice(selected[0], selected[-1] + 1) if is_contiguous else mx.array(selected)

    def select(self, x: mx.array) -> mx.array:
        """Select the tokens of this layout from those of the whole step, (B, L, ...)."""
        return x[:, self._rows]


class QueryShare(NamedTuple):
    """This rank's queries, where each rank computes the attention of some.

    Args:
        layout: this rank's queries.
        bounds: bounds of the queries of each rank.
    """

    layout: QueryLayout
    bounds: tuple[int, ...]


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
