"""A planner for tests that changes modes in any order."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kimi_mlx.engine.drafts.decision import Decision
from kimi_mlx.engine.drafts.drafter import Draft, Drafter
from kimi_mlx.engine.drafts.planner import DraftPlanner
from kimi_mlx.engine.drafts.records import DraftRecords
from kimi_mlx.engine.sequence import Sequence as EngineSequence


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
