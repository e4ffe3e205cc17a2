"""Choose the all-reduce method for each message size from timings. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.units import format_bytes

NO_LIMIT = 1 << 62
"""Limit in bytes that is larger than any message."""


@dataclass(frozen=True)
class AllReduceTiming:
    """Time of a sum: median over the rounds, mean over the ranks.

    Args:
        tokens: number of tokens in the message.
        size_bytes: size of a rank's part.
        gather_s: time with gather and local addition.
        all_sum_s: time with MLX's all_sum.
        rounds: number of timed rounds, of several sums each.
    """

    tokens: int
    size_bytes: int
    gather_s: float
    all_sum_s: float
    rounds: int


@dataclass(frozen=True)
class AllReduceChoice:
    """Result of the measurement.

    Args:
        gather_limit_bytes: maximum size of sums that are gathered and added locally; larger ones use all_sum.
        timings: timings in ascending order of size.
        is_same_bits: whether all_sum returned the same bits on every rank; otherwise it is not used.
        seconds: duration of the measurement.
    """

    gather_limit_bytes: int
    timings: tuple[AllReduceTiming, ...]
    is_same_bits: bool
    seconds: float

    def __str__(self) -> str:
        """Return a sentence without a full stop."""
        if not self.is_same_bits:
            return "sums are gathered and added: all_sum returns different bits on different ranks"
        if self.gather_limit_bytes == 0:
            return "sums use all_sum"
        if self.gather_limit_bytes == NO_LIMIT:
            return "sums are gathered and added"
        return f"sums up to {format_bytes(self.gather_limit_bytes)} are gathered and added, larger ones use all_sum"

    def details(self) -> str:
        """Return the sentence with the timings, for a log."""
        rows = [
            f"{timing.tokens} tokens, {format_bytes(timing.size_bytes)}: gathered {timing.gather_s * 1e3:.2f} ms, "
            f"all_sum {timing.all_sum_s * 1e3:.2f} ms ({timing.rounds} rounds)"
            for timing in self.timings
        ]
        return f"{self}; measured in {self.seconds:.2f} s: {'; '.join(rows)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON; no limit is null."""
        limit = None if self.gather_limit_bytes == NO_LIMIT else self.gather_limit_bytes
        return {**asdict(self), "gather_limit_bytes": limit}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> AllReduceChoice:
        """Read the output of to_dict."""
        limit = NO_LIMIT if value["gather_limit_bytes"] is None else value["gather_limit_bytes"]
        timings = tuple(AllReduceTiming(**timing) for timing in value["timings"])
        return cls(limit, timings, value["is_same_bits"], value["seconds"])


def gather_limit(timings: Sequence[AllReduceTiming], is_complete: bool) -> int:
    """Return the size in bytes up to which gathering is faster.

    The limit minimizes the sum of the times, each relative to the faster method. Between two sizes it is their
    geometric mean.

    Args:
        timings: timings in ascending order of size.
        is_complete: whether the largest message was measured; otherwise larger messages use all_sum, which sends less.
    """
    cuts = range(len(timings) + 1)
    best = min(cuts, key=lambda cut: (_relative_time(timings, cut), -cut))
    if best == 0:
        return 0
    if best == len(timings):
        return NO_LIMIT if is_complete else timings[-1].size_bytes
    return math.isqrt(timings[best - 1].size_bytes * timings[best].size_bytes)


def _relative_time(timings: Sequence[AllReduceTiming], cut: int) -> float:
    times = [timing.gather_s if index < cut else timing.all_sum_s for index, timing in enumerate(timings)]
    return sum(time_s / min(timing.gather_s, timing.all_sum_s) for time_s, timing in zip(times, timings, strict=True))
