"""Histogram of the number of sequences in the engine's steps. Does not import MLX."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

BATCH_SIZE_LIMITS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper limits of the buckets; one more bucket has all larger steps."""


@dataclass(frozen=True)
class BatchSizes:
    """Number of steps by the number of their sequences.

    Args:
        counts: number of steps in each bucket, not cumulative.
        total: number of sequences of all steps together.
    """

    counts: Sequence[int] = (0,) * (len(BATCH_SIZE_LIMITS) + 1)
    total: int = 0

    def with_step(self, size: int) -> BatchSizes:
        """Return the histogram with one more step; a step without sequences is not counted."""
        if not size:
            return self
        counts = list(self.counts)
        counts[bisect.bisect_left(BATCH_SIZE_LIMITS, size)] += 1
        return BatchSizes(counts, self.total + size)

    def to_dict(self) -> dict[str, int]:
        """Return the number of steps by bucket: `1`, `2`, `3-4` and so on, then `257 or more`."""
        lows = [1, *(limit + 1 for limit in BATCH_SIZE_LIMITS)]
        names = [
            str(low) if low == high else f"{low}-{high}" for low, high in zip(lows, BATCH_SIZE_LIMITS, strict=False)
        ]
        return dict(zip([*names, f"{lows[-1]} or more"], self.counts, strict=True))


NO_STEPS = BatchSizes()
