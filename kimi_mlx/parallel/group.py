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

    def send(self, x: mx.array, rank: int) -> mx.array:
        """Hand x to a neighbour; it leaves when what is returned (x) is evaluated."""
        ...

    def recv(self, like: mx.array, rank: int) -> mx.array:
        """What a neighbour sends: of the shape and type of `like`."""
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

    gather_limit_bytes = 0
    """Up to this size a sum is gathered and added here; the same on all ranks, see kimi_mlx.parallel.all_reduce."""

    def __init__(self, group: mx.distributed.Group):
        self._group = group
        self.rank = group.rank()
        self.size = group.size()

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the ranks, in the way that was measured to be the faster one for its size."""
        return self.sum_gathered(x) if x.nbytes <= self.gather_limit_bytes else self.all_sum(x)

    def sum_gathered(self, x: mx.array) -> mx.array:
        """Gather and add here, on all in the order of the ranks: N - 1 hops on a ring."""
        return self.gather(x).sum(axis=0)

    def all_sum(self, x: mx.array) -> mx.array:
        """MLX's sum: 2 (N - 1) hops on a ring, each of an N-th of the data."""
        return mx.distributed.all_sum(x, group=self._group)

    def gather(self, x: mx.array) -> mx.array:
        """Everybody's x, in the order of the ranks."""
        return mx.distributed.all_gather(x[None], group=self._group)

    def send(self, x: mx.array, rank: int) -> mx.array:
        """Hand x to another rank, on a ring a neighbour; it leaves when what is returned (x) is evaluated."""
        return mx.distributed.send(x, rank, group=self._group)

    def recv(self, like: mx.array, rank: int) -> mx.array:
        """What another rank, on a ring a neighbour, sends: of the shape and type of `like`."""
        return mx.distributed.recv_like(like, rank, group=self._group)
