"""Counters of experts that are read from the disk. Does not import MLX."""

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
"""Fields that are totals."""


@dataclass
class ExpertStats:
    """Totals since the model was loaded, for this rank; they only grow, so take differences.

    An expert counts once per layer and step, however many tokens of the step chose it. bytes_read is exactly
    (misses + guesses - guesses_right - guesses_cancelled) * expert_bytes if all layers store experts alike.

    Args:
        hits: experts that were needed and had been in memory before anything was read for this step.
        misses: experts that were needed and had to be read, also those that were guessed in time.
        bytes_read: bytes of the reads that were requested and not cancelled, without those of the start.
        wait_seconds: time that steps waited for reads.
        guesses: reads that began, or were queued, before the router had chosen.
        guesses_right: guessed experts that the router chose.
        guesses_cancelled: wrong guesses whose read had not begun.
        steps: steps of the model, of any number of tokens.
        kept_experts: routed experts that have a place in memory, of all layers of this rank. Not a total.
        num_experts: routed experts of all layers of this rank. Not a total.
        expert_bytes: bytes of one expert on the disk, the mean if layers differ. Not a total.
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
        """Return the present values, which later steps do not change."""
        return replace(self)

    @property
    def hit_rate(self) -> float | None:
        """Share of the needed experts that had been in memory; None if none were needed."""
        needed = self.hits + self.misses
        return self.hits / needed if needed else None

    def since(self, earlier: ExpertStats) -> ExpertStats:
        """Return the totals counted since earlier values of the same rank."""
        return replace(self, **{name: getattr(self, name) - getattr(earlier, name) for name in TOTALS})

    def with_earlier(self, earlier: ExpertStats) -> ExpertStats:
        """Return the totals together with those of a rank that was lost."""
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in TOTALS})

    @classmethod
    def of_ranks(cls, ranks: Iterable[ExpertStats]) -> ExpertStats:
        """Return the sums of several ranks; of times and steps, and of bytes of an expert, the largest."""
        every = [asdict(rank) for rank in ranks]
        largest = ("wait_seconds", "steps", "expert_bytes")
        return cls(**{name: (max if name in largest else sum)(rank[name] for rank in every) for name in every[0]})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON."""
        return asdict(self)
