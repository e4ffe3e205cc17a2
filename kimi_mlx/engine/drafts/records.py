"""The leader's records of drafts: their acceptance, their cost, and the times of steps."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from kimi_mlx.engine.drafts.acceptance import Acceptance
from kimi_mlx.engine.drafts.drafter import Draft, Drafter, Offer
from kimi_mlx.engine.drafts.plan import MAX_STEP_TOKENS
from kimi_mlx.engine.drafts.step_times import NUM_SAMPLES, Load, StepTimes

REPORTED_TOKENS = 4
"""Number of tokens per sequence in the example step of `off_reason`."""


@dataclass
class Trial:
    """A draft that is not verified, but compared with the tokens that are sampled later, at no cost.

    Args:
        drafter: the drafter that offered it.
        offer: the draft.
        start: number of known tokens when it was offered.
    """

    drafter: Drafter
    offer: Offer
    start: int


@dataclass
class SequenceDrafts:
    """Drafts of one sequence.

    Args:
        num_drafted: number of draft tokens that were verified.
        num_accepted: number of draft tokens that were accepted.
        offer: offer that the current draft comes from.
        trial: draft that is being compared.
        acceptance: acceptance by source.
    """

    num_drafted: int = 0
    num_accepted: int = 0
    offer: Offer | None = None
    trial: Trial | None = None
    acceptance: dict[str, Acceptance] = field(default_factory=dict[str, Acceptance])


@dataclass(frozen=True)
class Off:
    """The state in which nothing is drafted.

    Args:
        load: load of the steps.
        first_chance: largest probability that a first draft token is accepted; 1 if not even a certain draft would gain
            anything; None if there is nothing to draft.
    """

    load: Load
    first_chance: float | None


class DraftRecords:
    """Records of all sequences.

    Args:
        times: times of steps.

    Attributes:
        num_drafted: number of draft tokens that were verified.
        num_accepted: number of draft tokens that were accepted.
        off: state in which nothing is drafted now; None while drafts are on.
    """

    def __init__(self, times: StepTimes):
        self.times = times
        self.num_drafted = self.num_accepted = 0
        self.off: Off | None = None
        self._acceptance: dict[str, Acceptance] = {}
        self._draft_s: dict[str, deque[float]] = {}

    def acceptance(self, drafts: SequenceDrafts, source: str) -> Acceptance:
        """Return the acceptance of a sequence's drafts from a source."""
        if source not in drafts.acceptance:
            drafts.acceptance[source] = Acceptance(self._acceptance.setdefault(source, Acceptance()))
        return drafts.acceptance[source]

    def on_verified(self, drafts: SequenceDrafts, draft: Draft, num_accepted: int) -> None:
        """Record a draft that was verified."""
        if not draft or drafts.offer is None:
            return
        self.acceptance(drafts, drafts.offer.source).record(len(draft), num_accepted)
        drafts.num_drafted += len(draft)
        drafts.num_accepted += num_accepted
        self.num_drafted += len(draft)
        self.num_accepted += num_accepted

    def draft_s(self, source: str) -> float:
        """Return the seconds to propose one draft token; 0 before the first draft."""
        samples = self._draft_s.get(source)
        return statistics.median(samples) if samples else 0.0

    def on_drafted(self, source: str, length: int, seconds: float) -> None:
        """Record the seconds that a draft of `length` tokens took."""
        self._draft_s.setdefault(source, deque(maxlen=NUM_SAMPLES)).append(seconds / length)

    @property
    def off_reason(self) -> str | None:
        """Reason why nothing is drafted now, as text; None while drafts are on."""
        if self.off is None:
            return None
        if self.off.load.sequences >= MAX_STEP_TOKENS:
            return f"a step of {self.off.load.sequences} answers has no room for drafts"
        if self.off.first_chance is None:
            return "nothing to draft: the last tokens have not occurred before"
        load, tokens = self.off.load, self.off.load.sequences * REPORTED_TOKENS
        ratio = self.times.ratio(load, tokens)
        times = f"a step of {tokens} tokens takes {ratio:.1f} times as long as one of {load.sequences}"
        chance = self.off.first_chance
        return times if chance > 0.99 else f"{times}, and {chance:.0%} of first draft tokens are accepted"
