"""Fit the three constants to the marked rows of `backtest.json`: `python -m kimi_mlx.planner.fit`."""

from __future__ import annotations

import math

from kimi_mlx.planner.backtest import backtest, rows
from kimi_mlx.planner.constants import Constants

STEP, FINEST = 0.2, 0.001
"""First and last step of the search, relative to each constant."""


def fit() -> Constants:
    """Return the constants with the smallest sum of squared logarithms of predicted / published.

    Uses a pattern search.
    """
    chosen = [row for row in rows() if row.fit]

    def loss(values: list[float]) -> float:
        if values[0] > 1 or values[2] > 1:  # fractions of a peak
            return math.inf
        return sum(math.log1p(comparison.error) ** 2 for comparison in backtest(Constants(*values), chosen))

    values, step = [0.7, 5e-6, 0.5], STEP
    best = loss(values)
    while step > FINEST:
        candidates = [
            [value * factor if position == index else value for position, value in enumerate(values)]
            for index in range(3)
            for factor in (1 + step, 1 / (1 + step))
        ]
        losses = [loss(candidate) for candidate in candidates]
        if min(losses) < best:
            best, values = min(losses), candidates[losses.index(min(losses))]
        else:
            step /= 2
    return Constants(*values)


if __name__ == "__main__":
    print(fit())
