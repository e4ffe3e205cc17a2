"""The exchange of ranks that each compute a part of every layer: sums of the parts, and the gathered head."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.parallel.exchange import WORD_SIZE, RankExchange, Told, digest
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.placement import Placement


class SumExchange(RankExchange):
    """For `hybrid`, `tensor` and `expert`; the words ride in the gather of the vocabulary."""

    def __init__(self, group: Group, placement: Placement):
        super().__init__(group)
        self._widths = [len(share.vocab_rows) for share in placement.shares]
        self._divides_heads = placement.divides("heads")
        self.adds_residual = self.is_leader

    def add_attention(self, x: mx.array, part: mx.array) -> mx.array:
        """One collective if the heads are divided, none else."""
        if not self._divides_heads:
            return x + part
        return self.group.sum(x + part if self.is_leader else part)

    def sum_experts(self, part: mx.array) -> mx.array:
        """One collective."""
        return self.group.sum(part)

    def gather_vocabulary(self, logits: mx.array) -> mx.array:
        """Join the heads' outputs; shorter ones are padded on the way, since a gather needs equal shapes."""
        missing = max(self._widths) - logits.shape[-1]
        tail = mx.array([*[0.0] * missing, *self._next_word()]).astype(logits.dtype)
        tail = mx.broadcast_to(tail, (*logits.shape[:-1], tail.size))
        parts = self.group.gather(mx.concatenate([logits, tail], axis=-1))  # (ranks, ..., widest + WORD_SIZE)
        words = parts.reshape(self.group.size, -1, parts.shape[-1])[:, 0, -WORD_SIZE:]
        joined = mx.concatenate([parts[rank, ..., :width] for rank, width in enumerate(self._widths)], axis=-1)
        digests = self.group.gather(digest(joined)) if self._is_checked(self._number) else None
        self._told = Told(words, self._number, digests=digests)
        return joined

    def _compare(self, digests: np.ndarray) -> None:
        """Compare the logits of all ranks.

        Raises:
            RingError: they differ.
        """
        others = [rank for rank, row in enumerate(digests) if (row != digests[0]).any()]
        if others:
            raise RingError(
                f"rank {', '.join(map(str, others))} has other logits than rank 0 in the same step",
                hint="a link or the memory of a host is not sound: `kimi-mlx doctor` with the same hosts tests them",
                rank=others[0],
            )

    def close(self, hidden: mx.array) -> None:
        """Without logits the words take a collective of their own, behind the sums of the step."""
        word = mx.depends(mx.array(self._next_word()), hidden)
        self._told = Told(self.group.gather(word), self._number)
