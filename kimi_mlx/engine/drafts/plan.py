"""Choose the number of draft tokens of each sequence in a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kimi_mlx.engine.drafts.step_times import Load, StepTimes

MAX_STEP_TOKENS = 48
"""Maximum number of tokens of a step with drafts. With that many sequences nothing is drafted."""


@dataclass(frozen=True)
class DraftPlan:
    """Lengths of the drafts of a step.

    Args:
        lengths: number of draft tokens of each sequence.
        gain: expected tokens per second, relative to steps without drafts.
    """

    lengths: tuple[int, ...]
    gain: float


def plan_drafts(
    chances: Sequence[Sequence[float]], draft_s: Sequence[float], step_s: Callable[[int], float]
) -> DraftPlan:
    """Return the lengths with the most expected tokens per second; at least one draft token.

    The draft tokens are added in the order of their chances, and the best number of them is taken.

    Args:
        chances: for each sequence and each of its draft tokens, the probability that it and all before it are
            accepted; empty for a sequence without a draft. At least one is not empty, and there are fewer sequences
            than MAX_STEP_TOKENS.
        draft_s: for each sequence, the seconds to propose one draft token. All sequences are drafted for at once.
        step_s: function from the number of draft tokens to the seconds of a step.
    """
    # Sorting is stable, and chances never rise: a token never comes before the one that it follows.
    order = sorted(((chance, index) for index, row in enumerate(chances) for chance in row), key=lambda item: -item[0])
    lengths = [0] * len(chances)
    plain_s = step_s(0) / len(chances)
    best, best_gain = tuple(lengths), 0.0
    expected, drafting_s = float(len(chances)), 0.0
    for count, (chance, index) in enumerate(order[: MAX_STEP_TOKENS - len(chances)], start=1):
        expected += chance
        lengths[index] += 1
        drafting_s = max(drafting_s, lengths[index] * draft_s[index])
        gain = expected * plain_s / (step_s(count) + drafting_s)
        if gain > best_gain:
            best, best_gain = tuple(lengths), gain
    return DraftPlan(best, best_gain)


def needed_chance(times: StepTimes, load: Load, max_tokens: int) -> float:
    """Return the chance that first draft tokens need, so that drafts can gain anything; above 1 if none can.

    Args:
        times: times of steps.
        load: load of the steps.
        max_tokens: maximum number of draft tokens of each sequence.
    """
    max_count = min(load.sequences * max_tokens, MAX_STEP_TOKENS - load.sequences)
    counts = {1, max_count, *(count for count in (2, 4, 8, 16) if count < max_count)}
    return min((times.ratio(load, load.sequences + count) - 1) * load.sequences / count for count in counts)
