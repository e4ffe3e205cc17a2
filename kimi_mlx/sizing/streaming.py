"""Expected hits and speed when some experts are in memory and the others are read from the SSD.

Hits depend on how unequally a model's router chooses its experts, which is not published for K2. The assumption is
Zipf's law: the probability of the i-th most popular expert of a layer is in proportion to 1 / i**ZIPF_EXPONENT, and the
most popular experts are in memory. docs/streaming.md compares it with published speeds.
"""

from __future__ import annotations

from functools import cache

ZIPF_EXPONENT = 0.8
"""Assumed Zipf exponent of the experts' popularity; 0 is equal popularity.

Source: with it, 16 % of K2's experts get 58 % of the choices. The one published speed of K2 from an SSD that states its
sizes (rustane, M4 Max 128 GB, docs/streaming.md) needs about 60 % at the rate of that SSD."""

SYNC_S = 0.5e-3
"""Time per layer in which the GPU waits until the host knows the chosen experts: 0.3 to 1 ms are published."""

GUESSED_SHARE = 0.6
"""Share of the missing experts whose reads begin a layer earlier, because they were guessed. Published: 50 to 78 %."""

MIN_GAIN_OF_DOUBLING = 1.25
"""Minimum gain of total speed by doubling the number of sequences; with less, the number is not doubled."""


@cache
def choice_probabilities(num_experts: int, num_chosen: int, exponent: float = ZIPF_EXPONENT) -> tuple[float, ...]:
    """Return the probability that a token chooses each expert of a layer, the most popular first.

    No probability is above 1; their sum is `num_chosen`.
    """
    weights = [rank**-exponent for rank in range(1, num_experts + 1)]
    certain, left = 0, sum(weights)
    while certain < num_chosen and (num_chosen - certain) * weights[certain] > left:
        left -= weights[certain]
        certain += 1
    scale = (num_chosen - certain) / left if left > 0 else 0.0
    return (*(1.0 for _ in range(certain)), *(scale * weight for weight in weights[certain:]))


def expected_misses(
    num_experts: int, num_chosen: int, num_kept: float, tokens: int = 1, exponent: float = ZIPF_EXPONENT
) -> float:
    """Return the expected number of distinct experts of a layer that are chosen but not in memory.

    Args:
        num_experts: number of routed experts of the layer.
        num_chosen: number of experts per token.
        num_kept: number of experts in memory: the most popular ones; may be a mean over layers.
        tokens: number of tokens, which choose independently.
        exponent: exponent of the popularity; 0 for equal popularity.
    """
    whole = min(int(num_kept), num_experts)
    missing = choice_probabilities(num_experts, num_chosen, exponent)[whole:]
    chosen = [1 - (1 - probability) ** tokens for probability in missing]
    return max(sum(chosen) - (num_kept - whole) * (chosen[0] if chosen else 0), 0.0)


def hit_rate(num_experts: int, num_chosen: int, num_kept: float, exponent: float = ZIPF_EXPONENT) -> float:
    """Return the expected share of a token's choices that are in memory; arguments as for expected_misses."""
    return max(1 - expected_misses(num_experts, num_chosen, num_kept, exponent=exponent) / num_chosen, 0.0)


def paying_sequences(
    fixed_s: float, miss_s: float, num_experts: int, num_chosen: int, num_kept: float, most: int
) -> int:
    """Return the number of sequences that may run at the same time, a power of two or `most`.

    Each sequence adds misses, so that the others wait longer. Doubling their number pays as long as all of them
    together get MIN_GAIN_OF_DOUBLING times as fast.

    Args:
        fixed_s: time of a step that does not depend on the number of sequences.
        miss_s: time to read the missing experts of one token, in all layers.
        num_experts: number of routed experts per layer.
        num_chosen: number of experts per token.
        num_kept: number of experts per layer in memory.
        most: maximum number of sequences.
    """
    one = expected_misses(num_experts, num_chosen, num_kept)
    if one <= 0:
        return most

    def tokens_per_s(sequences: int) -> float:
        misses = expected_misses(num_experts, num_chosen, num_kept, sequences)
        return sequences / (fixed_s + miss_s * misses / one)

    sequences = 1
    while sequences < most and tokens_per_s(2 * sequences) >= MIN_GAIN_OF_DOUBLING * tokens_per_s(sequences):
        sequences *= 2
    return min(sequences, most)
