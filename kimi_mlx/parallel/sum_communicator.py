"""Communicator of ranks that each compute a part of every layer: sums of the parts, and a gather of the logits."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.parallel.communicator import HEADER_SIZE, RankCommunicator, StepHeader, digest
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.placement import Placement


class SumCommunicator(RankCommunicator):
    """Communicator for `hybrid`, `tensor` and `expert`. The header is sent with the gather of the logits."""

    def __init__(self, group: Group, placement: Placement):
        super().__init__(group)
        self._widths = [len(share.vocab_rows) for share in placement.shares]
        self._has_sharded_heads = placement.is_sharded("heads")
        self.owns_residual = self.is_leader

    def add_attention(self, x: mx.array, partial: mx.array) -> mx.array:
        """Add the attention to x: one collective if the heads are sharded, otherwise none."""
        if not self._has_sharded_heads:
            return x + partial
        return self.group.sum(x + partial if self.is_leader else partial)

    def sum_experts(self, partial: mx.array) -> mx.array:
        """Sum the experts: one collective."""
        return self.group.sum(partial)

    def gather_logits(self, logits: mx.array) -> mx.array:
        """Concatenate the logits of all ranks. Shorter ones are padded, because a gather needs equal shapes."""
        padding = max(self._widths) - logits.shape[-1]
        tail = mx.array([*[0.0] * padding, *self._next_header()]).astype(logits.dtype)
        tail = mx.broadcast_to(tail, (*logits.shape[:-1], tail.size))
        parts = self.group.gather(mx.concatenate([logits, tail], axis=-1))  # (ranks, ..., widest + HEADER_SIZE)
        fields = parts.reshape(self.group.size, -1, parts.shape[-1])[:, 0, -HEADER_SIZE:]
        joined = mx.concatenate([parts[rank, ..., :width] for rank, width in enumerate(self._widths)], axis=-1)
        digests = self.group.gather(digest(joined)) if self._is_checked(self._number) else None
        self._header = StepHeader(fields, self._number, digests=digests)
        return joined

    def _compare(self, digests: np.ndarray) -> None:
        """Compare the logits of all ranks.

        Raises:
            RingError: they differ.
        """
        others = [rank for rank, row in enumerate(digests) if (row != digests[0]).any()]
        if others:
            raise RingError(
                f"the logits of rank {', '.join(map(str, others))} differ from those of rank 0 in the same step",
                hint="a link or the memory of a host is faulty: test them with `kimi-mlx doctor` on the same hosts",
                rank=others[0],
            )

    def finish_step(self, hidden: mx.array) -> None:
        """Send the header of a step without logits in a gather of its own, after the sums of the step."""
        fields = mx.depends(mx.array(self._next_header()), hidden)
        self._header = StepHeader(self.group.gather(fields), self._number)
