"""A group: the ranks that talk, as the rest of the program sees it."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx


class Group(Protocol):
    """Ranks that compute the same steps together; the leader is rank 0."""

    @property
    def rank(self) -> int:
        """Which one this process is."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the ranks, the same bits on each."""
        ...

    def gather(self, x: mx.array) -> mx.array:
        """Everybody's x, stacked on a new first axis; equal shapes on all ranks."""
        ...


class LinkedGroup(Group, Protocol):
    """A group whose ranks stand in a circle, each with a link to the next."""

    def send(self, x: mx.array) -> mx.array:
        """Send x to the next rank when it is evaluated; returns x."""
        ...

    def receive(self, size: int, dtype: mx.Dtype) -> mx.array:
        """So many elements from the rank before us."""
        ...


class SingleGroup:
    """The group of one process without peers."""

    rank = 0
    size = 1

    def sum(self, x: mx.array) -> mx.array:
        """Nothing to add."""
        return x

    def gather(self, x: mx.array) -> mx.array:
        """A stack of one."""
        return x[None]


class MlxGroup:
    """A group over `mx.distributed`."""

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank = group.rank()
        self.size = group.size()

    def sum(self, x: mx.array) -> mx.array:
        """Small messages are gathered and added here: N - 1 hops on a ring, where all_sum takes 2 (N - 1)."""
        if x.nbytes <= GATHER_MAX_BYTES:
            return self.gather(x).sum(axis=0)
        return mx.distributed.all_sum(x, group=self._group)

    def gather(self, x: mx.array) -> mx.array:
        """Everybody's x, in the order of the ranks."""
        return mx.distributed.all_gather(x[None], group=self._group)

    def send(self, x: mx.array) -> mx.array:
        """To the next rank, from the last one to the first."""
        return mx.distributed.send(x, (self.rank + 1) % self.size, group=self._group)

    def receive(self, size: int, dtype: mx.Dtype) -> mx.array:
        """From the rank before us."""
        return mx.distributed.recv((size,), dtype, (self.rank - 1) % self.size, group=self._group)


GATHER_MAX_BYTES = 64 * 1024
"""Up to this size a sum is gathered (measured on loopback: equal for two ranks, half the time for three)."""
