"""What a model needs of each host. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.sizing.hosts import with_overhead


@dataclass(frozen=True)
class RankNeed:
    """What a rank holds: weights; cache and work space."""

    weights_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class ModelNeed:
    """A model as the doctor sees it.

    Args:
        name: as it was asked for.
        repository: whose stores the hosts should hold; None if it comes with kimi-mlx.
        weights_bytes: in memory, over all ranks; None if unknown.
        cache_bytes: of a usual context, on each rank.
        hidden_size: values that ranks sum, a token.
        vocab_size: values that ranks gather, a token.
        prefill_chunk: tokens of a prompt at once.
        is_here: whether this machine has all of it.
        store_prefix: what the folders of the chosen placement's stores begin with; None for any placement.
        by_rank: what each rank holds with the chosen placement; none if it is not known.
    """

    name: str
    repository: str | None
    weights_bytes: int | None
    cache_bytes: int
    hidden_size: int
    vocab_size: int
    prefill_chunk: int
    is_here: bool
    store_prefix: str | None = None
    by_rank: Sequence[RankNeed] = ()

    def memory_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """What a host's ranks need: by its stores, if it has them, else by its shares; None if unknown."""
        weights = self._stored_bytes(facts, ranks, world_size)
        if weights is None:
            weights = self._share_bytes(ranks, world_size)
        if weights is not None and self.by_rank:
            return weights + sum(self.by_rank[rank].other_bytes for rank in ranks)
        return None if weights is None else with_overhead(weights) + self.cache_bytes * len(ranks)

    def disk_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """What a host has still to store; None if unknown."""
        if self.repository is None or self._stored_bytes(facts, ranks, world_size) is not None:
            return 0
        return self._share_bytes(ranks, world_size)

    def _share_bytes(self, ranks: Sequence[int], world_size: int) -> int | None:
        """Weights of the chosen placement, or even shares."""
        if self.by_rank:
            return sum(self.by_rank[rank].weights_bytes for rank in ranks)
        return None if self.weights_bytes is None else self.weights_bytes * len(ranks) // world_size

    def _stored_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """Of the stores of all these ranks, for so many ranks; None if one is missing."""
        sizes = {
            store.rank: store.size_bytes
            for store in facts.stores
            if store.repository == self.repository
            and f"-{world_size}-" in store.placement
            and store.placement.startswith(self.store_prefix or "")
        }
        found = [sizes.get(rank) for rank in ranks]
        return sum(size for size in found if size is not None) if None not in found else None
