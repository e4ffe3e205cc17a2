"""Use of the prompt cache: size, and number of prompt tokens that were found in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class CacheUsage:
    """Use of the prompt cache by one rank since its model was loaded.

    Tokens are counted when a request starts, and again if it was preempted and resumes.

    Args:
        prompt_tokens: number of prompt tokens that were looked up.
        memory_hit_tokens: number of these that were in memory.
        disk_hit_tokens: number of these that were read from disk.
        disk_blocks: number of blocks on disk now, including those that are being written.
        disk_bytes: size of their rows.
        disk_limit_bytes: size that they may reach; None without a cache on disk, 0 if it cannot be used.
    """

    prompt_tokens: int = 0
    memory_hit_tokens: int = 0
    disk_hit_tokens: int = 0
    disk_blocks: int = 0
    disk_bytes: int = 0
    disk_limit_bytes: int | None = None

    def with_earlier(self, earlier: CacheUsage) -> CacheUsage:
        """Return this with the tokens that an earlier process of the rank has counted."""
        return replace(
            self,
            prompt_tokens=self.prompt_tokens + earlier.prompt_tokens,
            memory_hit_tokens=self.memory_hit_tokens + earlier.memory_hit_tokens,
            disk_hit_tokens=self.disk_hit_tokens + earlier.disk_hit_tokens,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the values as JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> CacheUsage:
        """Read the output of to_dict."""
        return cls(**{item.name: value[item.name] for item in fields(cls)})
