"""How many of a token's experts fall on the slowest rank, where ranks hold whole experts. Exact."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def expected_slowest(experts: Sequence[int], chosen: int, fixed: Sequence[float], each: Sequence[float]) -> float:
    """The expected time of the slowest rank, if every set of `chosen` experts is equally likely.

    Args:
        experts: how many each rank holds.
        chosen: how many a token uses.
        fixed: seconds of each rank without experts.
        each: seconds of each rank for one expert.
    """
    times = sorted({fix + load * one for fix, one in zip(fixed, each, strict=True) for load in range(chosen + 1)})
    expected, below = 0.0, 0.0
    for time in times:
        limits = [_limit(time, fix, one, chosen) for fix, one in zip(fixed, each, strict=True)]
        at_most = _probability(experts, chosen, limits)
        expected += (at_most - below) * time
        below = at_most
    return expected


def _limit(time: float, fixed: float, one: float, chosen: int) -> int:
    """How many experts a rank can run in `time`; -1 if not even none."""
    return max((load for load in range(chosen + 1) if fixed + load * one <= time * (1 + 1e-12)), default=-1)


def _probability(experts: Sequence[int], chosen: int, limits: Sequence[int]) -> float:
    """That no rank gets more than its limit: the coefficient of x^chosen in a product of polynomials, over all sets."""
    ways = [1] + [0] * chosen
    for held, limit in zip(experts, limits, strict=True):
        mine = [comb(held, load) if load <= limit else 0 for load in range(chosen + 1)]
        ways = [sum(ways[n - load] * mine[load] for load in range(n + 1)) for n in range(chosen + 1)]
    return ways[chosen] / comb(sum(experts), chosen)
