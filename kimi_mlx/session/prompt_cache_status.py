"""Status of the prompt cache of a model, summed over its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.engine.prompt_cache.usage import CacheUsage


@dataclass(frozen=True)
class PromptCacheStatus:
    """Use of the prompt cache since the model was ready. All ranks find the same tokens.

    Args:
        prompt_tokens: number of prompt tokens that were looked up: at the start of each request, and again if it was
            preempted and resumes.
        memory_hit_tokens: number of these that were in memory.
        disk_hit_tokens: number of these that were read from disk.
        miss_tokens: number of these that had to be computed.
        hit_rate: share of the tokens that were in memory or on disk; None before the first request.
        has_disk: whether the cache is also on disk.
        disk_blocks: number of blocks of 256 tokens on disk.
        disk_bytes: size of these blocks on all hosts together.
        disk_limit_bytes: size that they may reach; 0 if the folder cannot be used.
    """

    prompt_tokens: int = 0
    memory_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    miss_tokens: int = 0
    hit_rate: float | None = None
    has_disk: bool = False
    disk_blocks: int = 0
    disk_bytes: int = 0
    disk_limit_bytes: int = 0


def prompt_cache_status(ranks: Sequence[CacheUsage]) -> PromptCacheStatus:
    """Return the status.

    Args:
        ranks: use of the cache by each rank; empty if it is not known.
    """
    if not ranks:
        return PromptCacheStatus()
    first = ranks[0]
    hits = first.memory_hit_tokens + first.disk_hit_tokens
    return PromptCacheStatus(
        prompt_tokens=first.prompt_tokens,
        memory_hit_tokens=first.memory_hit_tokens,
        disk_hit_tokens=first.disk_hit_tokens,
        miss_tokens=first.prompt_tokens - hits,
        hit_rate=hits / first.prompt_tokens if first.prompt_tokens else None,
        has_disk=first.disk_limit_bytes is not None,
        disk_blocks=first.disk_blocks,
        disk_bytes=sum(rank.disk_bytes for rank in ranks),
        disk_limit_bytes=sum(rank.disk_limit_bytes or 0 for rank in ranks),
    )
