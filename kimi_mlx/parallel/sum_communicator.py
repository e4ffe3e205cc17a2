"""Communicator of ranks that each compute a part of every layer: sums of the parts, and a gather of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.model.batch_layout import BatchLayout
from kimi_mlx.model.query_split import QuerySplit
from kimi_mlx.parallel.communicator import (
    HEADER_SIZE,
    SEQUENCE_MODULUS,
    RankCommunicator,
    StepHeader,
    digest,
    lost_error,
)
from kimi_mlx.parallel.group import Group, barrier, gather_on_host
from kimi_mlx.parallel.placement import Placement

FEW_TOKENS = 16
"""A rank reads the experts of so few tokens in much less than 5 s, after which macOS ends the work of a GPU."""


class SumCommunicator(RankCommunicator):
    """Communicator for `hybrid`, `tensor` and `expert`. The header is sent with the gather of the logits."""

    def __init__(self, group: Group, placement: Placement):
        super().__init__(group)
        self._widths = [len(share.vocab_rows) for share in placement.shares]
        self._has_sharded_heads = placement.is_sharded("heads")
        self.owns_residual = self.is_leader
        self._digests: list[tuple[str, mx.array]] = []
        self._num_broadcasts = 0
        self.query_split: QuerySplit | None = None
        """Decides on the division of queries, from kimi_mlx.parallel.tune_split; None for no division."""
        self.is_any_streaming = False
        """Whether a rank reads experts from its disk, so that it may be late in the sums of prompts."""

    @property
    def can_divide_queries(self) -> bool:
        """Whether each rank has all weights of the attention."""
        return not self._has_sharded_heads

    def divide_queries(self, layout: BatchLayout) -> None:
        """Divide the queries of a layout over the ranks if that saves time."""
        if self.query_split is not None and (bounds := self.query_split.bounds(layout.lengths)) is not None:
            layout.divide(bounds, self.group.rank)

    def gather_queries(self, attended: mx.array, bounds: Sequence[int]) -> mx.array:
        """Concatenate the outputs of all ranks' queries: one gather. Fewer are padded to equal shapes."""
        counts = [stop - start for start, stop in pairwise(bounds)]
        padding = max(counts) - attended.shape[1]
        if padding:
            attended = mx.pad(attended, [(0, 0), (0, padding), (0, 0)])
        parts = self.group.gather(attended)  # (ranks, B, most queries, D)
        return mx.concatenate([parts[rank, :, :count] for rank, count in enumerate(counts)], axis=1)

    def add_attention(self, x: mx.array, partial: mx.array) -> mx.array:
        """Add the attention to x: one collective if the heads are sharded, otherwise none."""
        if not self._has_sharded_heads:
            return x + partial
        return self.group.sum(x + partial if self.is_leader else partial)

    def sum_experts(self, partial: mx.array) -> mx.array:
        """Sum the experts: one collective. For a late rank, wait on the CPU: no GPU operation may wait for it."""
        summed = self.group.sum(partial)
        if self.is_any_streaming and partial.shape[1] > FEW_TOKENS:
            mx.eval(summed)
        return summed

    def check_same(self, name: str, x: mx.array, is_set: bool = False) -> None:
        """Keep a digest of x for the comparison at the end of the step, if this step is checked."""
        if self._is_checked((self._number + 1) % SEQUENCE_MODULUS):  # the header increments the number
            self._digests.append((name, digest(mx.sort(x, axis=-1) if is_set else x)))

    def synchronize(self) -> None:
        """Wait on the CPU until all ranks have called this: a GPU consumes the later sums, and must not wait long."""
        barrier(self.group)

    def broadcast(self, numbers: Sequence[int]) -> list[int]:
        """Return the leader's numbers on every rank. Ranks wait for each other."""
        self._num_broadcasts = (self._num_broadcasts + 1) % SEQUENCE_MODULUS
        marks = [self._number, self._num_broadcasts]
        rows = gather_on_host(self.group, np.array([*marks, *numbers], np.int32))
        if not (rows[:, : len(marks)] == marks).all():
            raise lost_error(self.group.rank)
        return rows[0, len(marks) :].tolist()

    def gather_logits(self, logits: mx.array) -> mx.array:
        """Concatenate the logits of all ranks. Shorter ones are padded, because a gather needs equal shapes."""
        padding = max(self._widths) - logits.shape[-1]
        tail = mx.array([*[0.0] * padding, *self._next_header()]).astype(logits.dtype)
        tail = mx.broadcast_to(tail, (*logits.shape[:-1], tail.size))
        parts = self.group.gather(mx.concatenate([logits, tail], axis=-1))  # (ranks, ..., widest + HEADER_SIZE)
        fields = parts.reshape(self.group.size, -1, parts.shape[-1])[:, 0, -HEADER_SIZE:]
        joined = mx.concatenate([parts[rank, ..., :width] for rank, width in enumerate(self._widths)], axis=-1)
        if self._is_checked(self._number):
            self._digests.append(("logits", digest(joined)))
        self._header = self._checked_header(fields)
        return joined

    def _checked_header(self, fields: mx.array) -> StepHeader:
        """Return the header of a step, with a gather of all digests of the step, if there are any."""
        names, digests = [name for name, _ in self._digests], [value for _, value in self._digests]
        self._digests.clear()
        gathered = self.group.gather(mx.concatenate(digests)) if digests else None
        return StepHeader(fields, self._number, digests=gathered, names=tuple(names))

    def _compare(self, digests: np.ndarray, names: Sequence[str]) -> None:
        """Compare what all ranks should have computed alike; report the first difference of the step.

        Raises:
            RingError: a value differs.
        """
        for name, column in zip(names, digests.T, strict=True):
            others = np.flatnonzero(column != column[0])
            if others.size:
                raise RingError(
                    f"the {name} of rank {', '.join(map(str, others))} differ from those of rank 0 in the same step",
                    hint="use equal chips and MLX builds, or `--strategy pipeline`; if they are equal, a link or the "
                    "memory of a host is faulty: test them with `kimi-mlx doctor` on the same hosts",
                    rank=int(others[0]),
                )

    def finish_step(self, hidden: mx.array) -> None:
        """Send the header of a step without logits in a gather of its own, after the sums of the step."""
        fields = mx.depends(mx.array(self._next_header()), hidden)
        self._header = self._checked_header(self.group.gather(fields))
