"""Groups: the ranks that communicate."""

from __future__ import annotations

import os
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

FAST_FENCE = "MLX_METAL_FAST_SYNCH"
"""MLX's variable for the fast fence between GPU and network; 0 is off."""


class Group(Protocol):
    """Ranks that run the same steps; the leader is rank 0."""

    @property
    def rank(self) -> int:
        """Rank of this process."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks."""
        ...

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the ranks, with the same bits on each."""
        ...

    def gather(self, x: mx.array) -> mx.array:
        """Stack x of all ranks on a new first axis. Shapes must be equal."""
        ...


class LinkedGroup(Group, Protocol):
    """A group whose ranks form a circle with a link from each to the next."""

    def send(self, x: mx.array, rank: int) -> mx.array:
        """Send x to a neighbour when the returned array (x) is evaluated."""
        ...

    def recv(self, like: mx.array, rank: int) -> mx.array:
        """Receive an array with the shape and type of `like` from a neighbour."""
        ...


class SingleGroup:
    """The group of a single process."""

    rank = 0
    size = 1

    def sum(self, x: mx.array) -> mx.array:
        """Return x."""
        return x

    def gather(self, x: mx.array) -> mx.array:
        """Return x with a new first axis."""
        return x[None]


class MlxGroup:
    """A group over `mx.distributed`.

    With the fast fence all_gather sometimes returns stale data (gh:exo-explore/exo#1620), so it is replaced by all_sum.

    Args:
        group: MLX's group.
        has_fast_fence: whether the fast fence is on; None reads MLX's variable.
    """

    gather_limit_bytes = 0
    """Maximum size of sums that are gathered and added locally, set by kimi_mlx.parallel.all_reduce on all ranks."""

    def __init__(self, group: mx.distributed.Group, has_fast_fence: bool | None = None):
        self._group = group
        self.has_fast_fence = os.environ.get(FAST_FENCE, "0") != "0" if has_fast_fence is None else has_fast_fence
        self.rank = group.rank()
        self.size = group.size()

    def sum(self, x: mx.array) -> mx.array:
        """Sum over the ranks with the method that was measured to be faster for this size."""
        return self.sum_gathered(x) if x.nbytes <= self.gather_limit_bytes else self.all_sum(x)

    def sum_gathered(self, x: mx.array) -> mx.array:
        """Gather and add locally, in the order of the ranks: N - 1 hops on a ring."""
        return self.gather(x).sum(axis=0)

    def all_sum(self, x: mx.array) -> mx.array:
        """Sum with MLX's all_sum: 2 (N - 1) hops on a ring, each with 1/N of the data."""
        return mx.distributed.all_sum(x, group=self._group)

    def gather(self, x: mx.array) -> mx.array:
        """Stack x of all ranks in their order."""
        if not self.has_fast_fence:
            return mx.distributed.all_gather(x[None], group=self._group)
        before, after = (mx.zeros((count, *x.shape), x.dtype) for count in (self.rank, self.size - 1 - self.rank))
        return self.all_sum(mx.concatenate([before, x[None], after]))

    def send(self, x: mx.array, rank: int) -> mx.array:
        """Send x to another rank (on a ring, a neighbour) when the returned array (x) is evaluated."""
        return mx.distributed.send(x, rank, group=self._group)

    def recv(self, like: mx.array, rank: int) -> mx.array:
        """Receive an array like `like` from another rank (on a ring, a neighbour)."""
        return mx.distributed.recv_like(like, rank, group=self._group)


def gather_on_host(group: Group, values: npt.NDArray[Any] | list[Any]) -> npt.NDArray[Any]:
    """Gather small values of all ranks and wait for them on the CPU; return them as (ranks, ...).

    For collectives whose sender may be late, by minutes while weights are loaded: if a GPU operation consumed the
    result, its command buffer would wait for the sender, and macOS ends a command buffer after about 5 s.
    """
    return np.array(group.gather(mx.array(values)))


def sum_on_host(group: Group, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Sum values of all ranks and wait for them on the CPU, as gather_on_host does; for larger values."""
    x = mx.array(values)
    return np.array(group.all_sum(x) if isinstance(group, MlxGroup) else group.sum(x))


def barrier(group: Group) -> None:
    """Wait on the CPU until all ranks have called this."""
    if group.size > 1:
        gather_on_host(group, np.zeros(1, np.int32))
