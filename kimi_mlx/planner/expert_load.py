"""Expected time of the slowest rank if ranks hold whole experts, computed exactly."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def expected_slowest(experts: Sequence[int], chosen: int, fixed: Sequence[float], per_expert: Sequence[float]) -> float:
    """Return the expected time of the slowest rank, if every set of `chosen` experts is equally likely.

    Args:
        experts: number of experts on each rank.
        chosen: number of experts per token.
        fixed: seconds of each rank without experts.
        per_expert: seconds of each rank per expert.
    """
    times = sorted({fix + load * one for fix, one in zip(fixed, per_expert, strict=True) for load in range(chosen + 1)})
    expected, below = 0.0, 0.0
    for time in times:
        limits = [_limit(time, fix, one, chosen) for fix, one in zip(fixed, per_expert, strict=True)]
        at_most = _probability(experts, chosen, limits)
        expected += (at_most - below) * time
        below = at_most
    return expected


def _limit(time: float, fixed: float, one: float, chosen: int) -> int:
    """Return the number of experts that a rank can run in `time`; -1 if not even 0 fit."""
    return max((load for load in range(chosen + 1) if fixed + load * one <= time * (1 + 1e-12)), default=-1)


def _probability(experts: Sequence[int], chosen: int, limits: Sequence[int]) -> float:
    """Return the probability that no rank exceeds its limit.

    It is the coefficient of x^chosen in a product of polynomials, divided by the number of all possible sets.
    """
    ways = [1] + [0] * chosen
    for held, limit in zip(experts, limits, strict=True):
        mine = [comb(held, load) if load <= limit else 0 for load in range(chosen + 1)]
        ways = [sum(ways[n - load] * mine[load] for load in range(n + 1)) for n in range(chosen + 1)]
    return ways[chosen] / comb(sum(experts), chosen)
