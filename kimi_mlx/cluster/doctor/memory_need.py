"""Memory and disk space that a model needs on each host. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.sizing.hosts import with_overhead


@dataclass(frozen=True)
class DiskSpace:
    """Free space for files that are yet to be written.

    Args:
        folder: folder of the files.
        free_bytes: free bytes on its disk; None if unknown.
        variable: environment variable that chooses another folder.
    """

    folder: str | None
    free_bytes: int | None
    variable: str


@dataclass(frozen=True)
class RankNeed:
    """Memory of one rank: weights, and everything else (cache and workspace)."""

    weights_bytes: int
    other_bytes: int


@dataclass(frozen=True)
class ModelNeed:
    """Size and shape of a model, for the doctor.

    Args:
        name: model name as requested.
        repository: repository whose stores the hosts should hold; None if the model comes with kimi-mlx.
        weights_bytes: bytes of the weights in memory, over all ranks; None if unknown.
        cache_bytes: bytes of the cache of a usual context, on each rank.
        hidden_size: values per token that ranks sum.
        vocab_size: values per token that ranks gather.
        prefill_chunk: prompt tokens per step.
        is_here: whether this machine has the complete model.
        download_bytes: size of the download; None if unknown.
        store_prefix: start of the folder names of the chosen placement's stores; None for any placement.
        by_rank: memory of each rank with the chosen placement; empty if unknown.
        draft_download_bytes: size of the draft model that the host of rank 0 has yet to download.
    """

    name: str
    repository: str | None
    weights_bytes: int | None
    cache_bytes: int
    hidden_size: int
    vocab_size: int
    prefill_chunk: int
    is_here: bool
    download_bytes: int | None = None
    store_prefix: str | None = None
    by_rank: Sequence[RankNeed] = ()
    draft_download_bytes: int = 0

    def memory_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """Return the memory that a host's ranks need; None if unknown.

        With a chosen placement it is that of `kimi-mlx plan`; otherwise that of the stores, else of equal shares.
        """
        if self.by_rank:
            return sum(self.by_rank[rank].weights_bytes + self.by_rank[rank].other_bytes for rank in ranks)
        weights = self._stored_bytes(facts, ranks, world_size)
        if weights is None:
            weights = self._share_bytes(ranks, world_size)
        return None if weights is None else with_overhead(weights) + self.cache_bytes * len(ranks)

    def disk_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """Return the bytes that a host has yet to store; None if unknown."""
        if self.repository is None or self._stored_bytes(facts, ranks, world_size) is not None:
            return 0
        return self._share_bytes(ranks, world_size)

    def _share_bytes(self, ranks: Sequence[int], world_size: int) -> int | None:
        """Return the weights' bytes of these ranks with the chosen placement, else with equal shares."""
        if self.by_rank:
            return sum(self.by_rank[rank].weights_bytes for rank in ranks)
        return None if self.weights_bytes is None else self.weights_bytes * len(ranks) // world_size

    def _stored_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """Return the bytes of these ranks' stores in a split for `world_size` ranks; None if one is missing."""
        sizes = {
            store.rank: store.size_bytes
            for store in facts.stores
            if store.repository == self.repository
            and f"-{world_size}-" in store.placement
            and store.placement.startswith(self.store_prefix or "")
        }
        rank_sizes = [sizes.get(rank) for rank in ranks]
        return sum(size for size in rank_sizes if size is not None) if None not in rank_sizes else None
