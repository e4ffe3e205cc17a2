"""Memory and disk space that a model needs on each host. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.cluster.hosts.facts import Facts
from kimi_mlx.sizing.experts import RESERVE
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
    """Memory of one rank.

    Args:
        weights_bytes: all of its weights, in memory or on disk.
        other_bytes: everything else: cache and workspace.
        experts_bytes: part of the weights that may be read from the SSD instead; 0 if all must be in memory.
        staging_bytes: memory that such experts need at least.
        expert_bytes: size of one expert; 0 if unknown.
        budget_bytes: memory for experts that the user has set; None for as much as there is.
    """

    weights_bytes: int
    other_bytes: int
    experts_bytes: int = 0
    staging_bytes: int = 0
    expert_bytes: int = 0
    budget_bytes: int | None = None

    @property
    def host_need(self) -> HostNeed:
        """What the rank needs of its host's memory."""
        whole = self.weights_bytes + self.other_bytes
        if self.budget_bytes is None:
            return HostNeed(whole, self.experts_bytes, self.staging_bytes)
        return HostNeed(whole - max(self.experts_bytes - self.budget_bytes, 0))


@dataclass(frozen=True)
class HostNeed:
    """Memory that the ranks of a host need.

    Args:
        memory_bytes: with all experts in memory.
        experts_bytes: part of it for experts that may be read from the SSD instead.
        staging_bytes: memory that such experts need at least.
    """

    memory_bytes: int
    experts_bytes: int = 0
    staging_bytes: int = 0

    @property
    def smallest_bytes(self) -> int:
        """Memory with as few experts in memory as possible."""
        return self.memory_bytes - max(self.experts_bytes - self.staging_bytes, 0)

    def kept_share(self, limit_bytes: int) -> float | None:
        """Return the fraction of the experts that fit within a limit; None if not even the rest fits."""
        if self.smallest_bytes > limit_bytes or not self.experts_bytes:
            return None
        left = (1 - RESERVE) * limit_bytes - (self.memory_bytes - self.experts_bytes)
        return min(max((left - self.staging_bytes) / self.experts_bytes, 0.0), 1.0)


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

    def memory(self, facts: Facts, ranks: Sequence[int], world_size: int) -> HostNeed | None:
        """Return the memory that a host's ranks need; None if unknown.

        With a chosen placement it is that of `kimi-mlx plan`; otherwise that of the stores, else of equal shares.
        """
        if self.by_rank:
            needs = [self.by_rank[rank].host_need for rank in ranks]
            return HostNeed(
                sum(need.memory_bytes for need in needs),
                sum(need.experts_bytes for need in needs),
                sum(need.staging_bytes for need in needs),
            )
        weights = self._stored_bytes(facts, ranks, world_size)
        if weights is None:
            weights = self._share_bytes(ranks, world_size)
        return None if weights is None else HostNeed(with_overhead(weights) + self.cache_bytes * len(ranks))

    def memory_bytes(self, facts: Facts, ranks: Sequence[int], world_size: int) -> int | None:
        """Return the memory that a host's ranks need with all experts in memory; None if unknown."""
        need = self.memory(facts, ranks, world_size)
        return None if need is None else need.memory_bytes

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
