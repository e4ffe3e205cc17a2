"""Biases of a router by which experts are chosen about as often as Zipf's law says."""

from __future__ import annotations

from math import exp
from statistics import NormalDist

import numpy as np

MAX_SHARE = 0.98
"""Largest share of the tokens that choose one expert."""


def popularity(num_experts: int, num_chosen: int, exponent: float) -> np.ndarray:
    """Return the share of the tokens that choose each expert, the most popular first: (num_experts,), sum num_chosen.

    Shares are in proportion to 1 / rank^exponent. Where that is more than MAX_SHARE, the rest goes to the others.
    """
    weights = np.arange(1, num_experts + 1, dtype=np.float64) ** -exponent
    shares = np.full(num_experts, MAX_SHARE)
    for first in range(num_experts):
        shares[first:] = weights[first:] * (num_chosen - MAX_SHARE * first) / weights[first:].sum()
        if shares[first] <= MAX_SHARE:
            break
        shares[first] = MAX_SHARE
    return shares


def zipf_bias(num_experts: int, num_chosen: int, exponent: float) -> np.ndarray:
    """Return correction biases for a sigmoid router whose logits are normal with variance 1, most popular expert first.

    An expert is chosen if its score and its bias exceed those of the others, nearly a constant with many experts. So
    the bias lifts over 0 the quantile of the scores that belongs to the expert's share.

    Args:
        num_experts: number of routed experts.
        num_chosen: number that a token chooses.
        exponent: exponent of Zipf's law.

    Returns:
        (num_experts,) float32.
    """
    quantiles = [NormalDist().inv_cdf(1 - share) for share in popularity(num_experts, num_chosen, exponent)]
    return np.array([-1 / (1 + exp(-quantile)) for quantile in quantiles], np.float32)


def fitted_exponent(counts: np.ndarray) -> float:
    """Return the exponent of Zipf's law that fits counts best: the slope of log count over log rank.

    Args:
        counts: number of uses of each expert; those without any are left out.
    """
    used = np.sort(counts[counts > 0])[::-1]
    slope, _ = np.polyfit(np.log(np.arange(1, len(used) + 1)), np.log(used), 1)
    return -float(slope)
