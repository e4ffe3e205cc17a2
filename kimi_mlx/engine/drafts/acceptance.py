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

    Results of later tokens decay with every draft, also with shorter ones: so longer drafts are tried again.

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

        Before there are results, a token is as likely as the one before; in a sequence, with the ratio of the two in
        all sequences.
        """
        others = [] if self._prior is None else self._prior.probabilities(count)
        found: list[float] = []
        for index in range(count):
            is_known = index < len(self._verified)
            verified, accepted = (self._verified[index], self._accepted[index]) if is_known else (0.0, 0.0)
            if not index:
                prior = others[0] if others else FIRST_GUESS
            else:
                prior = min(found[-1] * (others[index] / others[index - 1] if others else 1.0), 1.0)
            found.append((accepted + PRIOR_WEIGHT * prior) / (verified + PRIOR_WEIGHT))
        return found

    def chances(self, count: int) -> list[float]:
        """Return for each of the first draft tokens the probability that it and all before it are accepted."""
        return list(itertools.accumulate(self.probabilities(count), lambda chance, next_: chance * next_))
