"""Acceptance rates of draft tokens, by their position in the draft."""

from __future__ import annotations

import itertools

FIRST_GUESS = 0.6
"""Assumed probability that a draft token is accepted, before any was verified."""

PRIOR_WEIGHT = 2.0
"""Weight of the prior, in verified tokens: so small that two or three wrong drafts of a sequence outweigh it."""

DECAY, LONG_DECAY = 0.95, 0.99
"""Decay of older results per draft: of one sequence, and of all."""


class Acceptance:
    """Decaying averages of the acceptance of draft tokens, each given that all before it were accepted.

    Results of later tokens decay with every draft, even a shorter one, so longer drafts are tried again.

    Args:
        prior: acceptance of all sequences, used until this one has results; None for FIRST_GUESS.
    """

    def __init__(self, prior: Acceptance | None = None):
        self._prior, self._decay = prior, LONG_DECAY if prior is None else DECAY
        self._verified: list[float] = []
        self._accepted: list[float] = []

    def record(self, drafted: int, accepted: int) -> None:
        """Record a verified draft.

        Args:
            drafted: number of draft tokens.
            accepted: number of leading draft tokens that were accepted.
        """
        missing = [0.0] * (drafted - len(self._verified))
        self._verified = [weight * self._decay for weight in self._verified + missing]
        self._accepted = [weight * self._decay for weight in self._accepted + missing]
        for index in range(min(drafted, accepted + 1)):
            self._verified[index] += 1
            self._accepted[index] += index < accepted
        if self._prior is not None:
            self._prior.record(drafted, accepted)

    def probabilities(self, count: int) -> list[float]:
        """Return for each of the first draft tokens the probability that it is accepted, if all before it were.

        A token without results gets the probability of the previous token, times the ratio of the two in all sequences
        if there is a prior.
        """
        prior_values = [] if self._prior is None else self._prior.probabilities(count)
        probabilities: list[float] = []
        for index in range(count):
            is_known = index < len(self._verified)
            verified, accepted = (self._verified[index], self._accepted[index]) if is_known else (0.0, 0.0)
            if not index:
                prior = prior_values[0] if prior_values else FIRST_GUESS
            else:
                ratio = prior_values[index] / prior_values[index - 1] if prior_values else 1.0
                prior = min(probabilities[-1] * ratio, 1.0)
            probabilities.append((accepted + PRIOR_WEIGHT * prior) / (verified + PRIOR_WEIGHT))
        return probabilities

    def chances(self, count: int) -> list[float]:
        """Return for each of the first draft tokens the probability that it and all before it are accepted."""
        return list(itertools.accumulate(self.probabilities(count), lambda chance, next_: chance * next_))
