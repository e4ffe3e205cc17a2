"""How often drafts are accepted, by the number of the draft token."""

from __future__ import annotations

import itertools

FIRST_GUESS = 0.6
"""Assumed probability that a draft token is accepted, before any was verified."""

PRIOR_WEIGHT = 2.0
"""Number of verified tokens that the prior counts as: a sequence whose drafts are wrong shows it in two or three."""

DECAY, LONG_DECAY = 0.95, 0.99
"""Decay of older results per draft: of one sequence, and of all."""


class Acceptance:
    """Decaying averages of the acceptance of draft tokens, each given that all before it were accepted.

    Args:
        prior: acceptance of other sequences, which counts until this one has results; None for a constant.
    """

    def __init__(self, prior: Acceptance | None = None):
        self._prior, self._decay = prior, LONG_DECAY if prior is None else DECAY
        self._verified: list[float] = []
        self._accepted: list[float] = []

    def record(self, drafted: int, accepted: int) -> None:
        """Record a verified draft.

        Args:
            drafted: number of draft tokens.
            accepted: number of them that were accepted, the first ones.
        """
        for index in range(min(drafted, accepted + 1)):
            if index == len(self._verified):
                self._verified.append(0.0)
                self._accepted.append(0.0)
            self._verified[index] = self._verified[index] * self._decay + 1
            self._accepted[index] = self._accepted[index] * self._decay + (index < accepted)
        if self._prior is not None:
            self._prior.record(drafted, accepted)

    def probabilities(self, count: int) -> list[float]:
        """Return for each of the first draft tokens the probability that it is accepted, if all before it were."""
        priors = [FIRST_GUESS] * count if self._prior is None else self._prior.probabilities(count)
        found: list[float] = []
        for index in range(count):
            is_known = index < len(self._verified)
            verified, accepted = (self._verified[index], self._accepted[index]) if is_known else (0.0, 0.0)
            # Of all sequences: a token that was never verified is as likely as the one before.
            prior = found[-1] if self._prior is None and found else priors[index]
            found.append((accepted + PRIOR_WEIGHT * prior) / (verified + PRIOR_WEIGHT))
        return found

    def chances(self, count: int) -> list[float]:
        """Return for each of the first draft tokens the probability that it and all before it are accepted."""
        return list(itertools.accumulate(self.probabilities(count), lambda chance, next_: chance * next_))
