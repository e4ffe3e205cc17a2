"""Which way to make a sum over the ranks, decided from timings. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.units import format_bytes

NO_LIMIT = 1 << 62
"""Bytes: more than any message has."""


@dataclass(frozen=True)
class AllReduceTiming:
    """The times of a sum: medians, of which the mean over the ranks.

    Args:
        tokens: at once.
        size_bytes: of a rank's part.
        gather_s: gathered and added here.
        all_sum_s: by MLX's all_sum.
        rounds: how often each was timed, several in a row.
    """

    tokens: int
    size_bytes: int
    gather_s: float
    all_sum_s: float
    rounds: int


@dataclass(frozen=True)
class AllReduceChoice:
    """What came of the measurement.

    Args:
        gather_limit_bytes: up to this size sums are gathered and added here, larger ones use all_sum.
        timings: by which it was decided, small ones first.
        is_same_bits: whether all_sum gave the same bits on every rank; if not, it is not used.
        seconds: that the measurement took.
    """

    gather_limit_bytes: int
    timings: tuple[AllReduceTiming, ...]
    is_same_bits: bool
    seconds: float

    def __str__(self) -> str:
        """In a sentence without a full stop."""
        if not self.is_same_bits:
            return "sums are gathered and added: all_sum gives other bits on other ranks"
        if self.gather_limit_bytes == 0:
            return "sums use all_sum"
        if self.gather_limit_bytes == NO_LIMIT:
            return "sums are gathered and added"
        return f"sums up to {format_bytes(self.gather_limit_bytes)} are gathered and added, larger ones use all_sum"

    def details(self) -> str:
        """The same with the timings, for a log."""
        rows = [
            f"{each.tokens} tokens, {format_bytes(each.size_bytes)}: gathered {each.gather_s * 1e3:.2f} ms, "
            f"all_sum {each.all_sum_s * 1e3:.2f} ms ({each.rounds} rounds)"
            for each in self.timings
        ]
        return f"{self}; measured in {self.seconds:.2f} s: {'; '.join(rows)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON; without a limit it is null."""
        limit = None if self.gather_limit_bytes == NO_LIMIT else self.gather_limit_bytes
        return {**asdict(self), "gather_limit_bytes": limit}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AllReduceChoice:
        """Read what to_dict has written."""
        limit = NO_LIMIT if value["gather_limit_bytes"] is None else value["gather_limit_bytes"]
        timings = tuple(AllReduceTiming(**each) for each in value["timings"])
        return cls(limit, timings, value["is_same_bits"], value["seconds"])


def gather_limit(timings: Sequence[AllReduceTiming], is_complete: bool) -> int:
    """The size in bytes up to which gathering pays.

    The cut is where the times, each relative to the better way's, are least in sum; between two sizes it is at their
    geometric mean.

    Args:
        timings: small ones first.
        is_complete: whether they go up to the largest message; if not, larger ones than measured use all_sum, which
            sends less.
    """
    cuts = range(len(timings) + 1)
    best = min(cuts, key=lambda cut: (_relative_time(timings, cut), -cut))
    if best == 0:
        return 0
    if best == len(timings):
        return NO_LIMIT if is_complete else timings[-1].size_bytes
    return math.isqrt(timings[best - 1].size_bytes * timings[best].size_bytes)


def _relative_time(timings: Sequence[AllReduceTiming], cut: int) -> float:
    chosen = [each.gather_s if index < cut else each.all_sum_s for index, each in enumerate(timings)]
    return sum(taken / min(each.gather_s, each.all_sum_s) for taken, each in zip(chosen, timings, strict=True))
