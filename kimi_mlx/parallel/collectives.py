"""The model's exchange over a group: sums of partial outputs, the gathered head, and what is agreed on beside it."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError
from kimi_mlx.model.decoder import Exchange
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.placement import Placement

STAMPS = 251
"""Step numbers go around here: whole numbers up to 256 are exact in bfloat16."""


class GroupExchange(Exchange):
    """What a rank of several asks of its peers.

    When MLX's ring loses a peer (seen in 0.32), one gather may return what happens to be in memory before all later
    ones hang. So the last gather of a step carries the step's number from each rank; and on the way the leader's wish
    to stop.
    """

    wish = False
    """Whether this rank wants to stop; that of the leader counts."""

    def __init__(self, group: Group, placement: Placement):
        self.group = group
        self._number = 0
        self._told = mx.zeros((group.size, 2))
        self._widths = [len(share.vocab_rows) for share in placement.shares]
        self.adds_residual = group.rank == 0

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the ranks: one collective."""
        return self.group.sum(x)

    def gather_vocabulary(self, logits: mx.array) -> mx.array:
        """Join the heads' outputs; shorter ones are padded on the way, since a gather needs equal shapes."""
        missing = max(self._widths) - logits.shape[-1]
        word = mx.broadcast_to(self._word(missing).astype(logits.dtype), (*logits.shape[:-1], missing + 2))
        parts = self.group.gather(mx.concatenate([logits, word], axis=-1))  # (ranks, ..., widest + 2)
        self._told = parts.reshape(self.group.size, -1, parts.shape[-1])[:, 0, -2:]
        return mx.concatenate([parts[rank, ..., :width] for rank, width in enumerate(self._widths)], axis=-1)

    def vote(self) -> None:
        """The same without logits, for a step that has none: a collective of its own."""
        self._told = self.group.gather(self._word(0))

    @property
    def told(self) -> tuple[mx.array, int]:
        """What all said in the last gather, to be evaluated with its step, and the step's number."""
        return self._told, self._number

    def is_stopped(self, told: tuple[mx.array, int]) -> bool:
        """Whether the leader wanted to stop in a step: the same on all ranks.

        Raises:
            RingError: what came is not of this step.
        """
        rows = np.array(told[0].astype(mx.float32))
        if not (rows[:, 0] == told[1]).all():
            raise RingError("a rank is lost: what came over the ring is not of this step", rank=self.group.rank)
        return bool(rows[0, 1] > 0)

    def _word(self, padding: int) -> mx.array:
        self._number = (self._number + 1) % STAMPS
        return mx.array([*[0.0] * padding, float(self._number), float(self.wish)])
