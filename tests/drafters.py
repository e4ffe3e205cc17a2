"""Drafters and planners for tests: with a given acceptance, and in any order of modes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from kimi_mlx.engine.drafts.decision import Decision
from kimi_mlx.engine.drafts.drafter import Draft, Drafter, Offer
from kimi_mlx.engine.drafts.planner import DraftPlanner
from kimi_mlx.engine.drafts.records import DraftRecords
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
    """

    def __init__(
        self, answers: Mapping[tuple[int, ...], Sequence[int]], acceptance: float, vocab_size: int, seed: int = 0
    ):
        self._answers, self._acceptance, self._vocab_size = answers, acceptance, vocab_size
        self._random = random.Random(seed)
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
        return drafts

    def observe(self, step: InFlightStep) -> None:
        """Do nothing."""


class RandomPlanner(DraftPlanner):
    """A planner that changes the mode, and the lengths of drafts, at random."""

    def __init__(self, drafters: Sequence[Drafter], records: DraftRecords, max_tokens: int):
        super().__init__(drafters, records, max_tokens)
        self._random = random.Random(0)
        self.modes: list[bool] = []
        """Mode after each decision."""

    def wants_decision(self, sequences: Sequence[EngineSequence], others_decode: bool) -> bool:
        """Return True in half of the steps."""
        super().wants_decision(sequences, others_decode)
        return self._random.random() < 0.5

    def decide(self, sequences: Sequence[EngineSequence], others_decode: bool) -> Decision:
        """Draft for some sequences, or go on without drafts."""
        is_drafting = self._random.random() < 0.7
        self.modes.append(is_drafting)
        drafts: list[Draft] = [()] * len(sequences)
        for index, sequence in enumerate(sequences if is_drafting else []):
            limit = min(self._max_tokens, sequence.remaining_tokens - 1)
            if limit < 1 or self._random.random() < 0.2:
                continue
            for drafter in self._drafters:
                offer = drafter.offer(sequence, limit)
                if offer is not None:
                    sequence.drafts.offer = offer
                    drafts[index] = drafter.draft([(sequence, offer, self._random.randint(1, offer.length))])[0]
        return Decision(tuple(drafts), is_drafting)
