"""Counters of hits, misses and reads of streamed experts. Does not import MLX."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

TOTALS = (
    "hits",
    "misses",
    "bytes_read",
    "wait_seconds",
    "guesses",
    "guesses_right",
    "guesses_cancelled",
    "steps",
)
"""Fields that only grow, so that differences are meaningful."""


@dataclass
class ExpertStats:
    """Totals of this rank since the model was loaded. Use `since` for the totals of a period.

    An expert counts once per layer and step, however many tokens of the step chose it. bytes_read is exactly
    (misses + guesses - guesses_right - guesses_cancelled) * expert_bytes if all layers store experts alike.

    Args:
        hits: needed experts that were in memory before the step.
        misses: needed experts that were read for the step, correct guesses included.
        bytes_read: bytes of all reads that were not cancelled, without those while the model was loaded.
        wait_seconds: time that steps waited for reads.
        guesses: prefetches: reads that were requested before the router had chosen.
        guesses_right: guessed experts that the router chose.
        guesses_cancelled: wrong guesses that were cancelled before their read began.
        steps: steps of the model, of any number of tokens.
        kept_experts: number of slots for routed experts in all layers of this rank. Not a total.
        num_experts: number of routed experts in all layers of this rank. Not a total.
        expert_bytes: bytes of one expert on disk, the mean if layers differ. Not a total.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    wait_seconds: float = 0.0
    guesses: int = 0
    guesses_right: int = 0
    guesses_cancelled: int = 0
    steps: int = 0
    kept_experts: int = 0
    num_experts: int = 0
    expert_bytes: int = 0

    def copy(self) -> ExpertStats:
        """Return a copy, which later steps do not change."""
        return replace(self)

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that were in memory; None if no expert was needed."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else None

    def since(self, earlier: ExpertStats) -> ExpertStats:
        """Return the totals since an earlier copy of the counters of this rank."""
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in TOTALS})

    def with_earlier(self, earlier: ExpertStats) -> ExpertStats:
        """Return the sum of these totals and those of a lost rank that this rank replaces."""
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in TOTALS})

    @classmethod
    def of_ranks(cls, ranks: Iterable[ExpertStats]) -> ExpertStats:
        """Return the sums over ranks; for wait_seconds, steps and expert_bytes the maximum."""
        every = [asdict(rank) for rank in ranks]
        largest = ("wait_seconds", "steps", "expert_bytes")
        return cls(**{name: (max if name in largest else sum)(rank[name] for rank in every) for name in every[0]})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)
