"""A drafter with a given acceptance, for tests and benchmarks."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence

from kimi_mlx.engine.drafts.drafter import Draft, Offer
from kimi_mlx.engine.sequence import Sequence as EngineSequence
from kimi_mlx.engine.step_runner import InFlightStep

SOURCE = "oracle"


class Oracle:
    """A drafter that knows the answers.

    Args:
        answers: prompts and their answers.
        acceptance: probability that a draft token is the right one.
        vocab_size: size of the vocabulary.
        seed: seed of the choice between right and wrong tokens.
        token_s: time to take for each draft token of the longest draft.
    """

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], Sequence[int]],
        acceptance: float,
        vocab_size: int,
        seed: int = 0,
        token_s: float = 0.0,
    ):
        self._answers, self._acceptance, self._vocab_size = answers, acceptance, vocab_size
        self._random, self._token_s = random.Random(seed), token_s
        self.lengths: list[int] = []
        """Lengths of all drafts."""

    def offer(self, sequence: EngineSequence, limit: int) -> Offer | None:
        """Offer as many tokens as may be generated."""
        return Offer(SOURCE, limit)

    def draft(self, requests: Sequence[tuple[EngineSequence, Offer, int]]) -> list[Draft]:
        """Return tokens of the answer, some of them changed."""
        drafts: list[Draft] = []
        for sequence, _, length in requests:
            at = sequence.generated
            right = list(self._answers.get(sequence.request.prompt, ()))[at : at + length]
            right += [0] * (length - len(right))
            draft = [
                token if self._random.random() < self._acceptance else (token + 1) % self._vocab_size for token in right
            ]
            drafts.append(sequence.sampler.allowed_prefix(draft))
            self.lengths.append(length)
        time.sleep(self._token_s * max(length for _, _, length in requests))
        return drafts

    def observe(self, step: InFlightStep) -> None:
        """Do nothing."""
