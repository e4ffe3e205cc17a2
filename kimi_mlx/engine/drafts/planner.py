"""The leader's decisions on drafts for one batch: when to draft, and the number of tokens for each sequence.

Without drafts, steps are launched ahead, on tokens that are not read yet, at no cost. Drafts start when the expected
gain is clear. Otherwise they are tried from time to time, less often each time that they gain nothing. Such a trial is
a probe: a step with drafts that are not expected to gain anything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kimi_mlx.engine.drafts.decision import Decision
from kimi_mlx.engine.drafts.drafter import Draft, Drafter, Offer, accepted_length
from kimi_mlx.engine.drafts.plan import MAX_STEP_TOKENS, DraftPlan, needed_chance, plan_drafts
from kimi_mlx.engine.drafts.records import DraftRecords, Off, Trial
from kimi_mlx.engine.drafts.step_times import MIN_SAMPLES, Load, StepClock

if TYPE_CHECKING:
    from kimi_mlx.engine.sequence import Sequence
    from kimi_mlx.engine.step_runner import InFlightStep

START_GAIN, STAY_GAIN = 1.05, 1.02
"""Expected gain from which drafts start, and above which they stay on."""

FIRST_PROBE_STEPS, MAX_PROBE_STEPS = 16, 512
"""Number of steps without drafts before a probe; doubled each time that a probe gains nothing."""

PROBE_SHARE = 0.005
"""Maximum share of the time that probes may cost; cheaper probes run more often."""

MAX_PROBES = 8
"""Maximum number of consecutive probes; another one follows only if draft tokens were accepted."""

FIRST_REFRESH_STEPS, MAX_REFRESH_STEPS = 64, 1024
"""Number of steps with drafts after which steps without drafts are measured; doubled each time."""

REFRESH_STEPS = 4
"""Number of steps without drafts that are measured then, and at each new load; the first one is discarded."""

FIRST_PAUSE_STEPS, MAX_PAUSE_STEPS = 2, 64
"""Number of steps before drafts are considered again after a useless switch to drafts; doubled each time."""

LINGER_STEPS = 3
"""Number of steps without any draft after which drafts end, if the last one was accepted in part."""


@dataclass(frozen=True)
class Candidate:
    """An offer for a sequence.

    Args:
        drafter: the drafter that offers.
        offer: the offer.
        chances: for each draft token, the probability that it and all before it are accepted.
    """

    drafter: Drafter
    offer: Offer
    chances: list[float]


class DraftPlanner:
    """Decides for one batch.

    Args:
        drafters: sources of drafts; the first one wins if chances are equal.
        records: records of all batches.
        max_tokens: maximum number of draft tokens per step and sequence.
    """

    def __init__(self, drafters: ListOf[Drafter], records: DraftRecords, max_tokens: int):
        self._drafters, self._records, self._max_tokens = drafters, records, max_tokens
        self.clock = StepClock(records.times)
        self._steps_ahead = self._steps_with_drafts = self._steps_without_offer = self._pause = 0
        self._probe_steps, self._pause_steps = FIRST_PROBE_STEPS, FIRST_PAUSE_STEPS
        self._refresh_steps = FIRST_REFRESH_STEPS
        self._num_probes, self._has_accepted = 0, False

    def observe(self, step: InFlightStep) -> None:
        """Pass a step whose tokens are read to the drafters."""
        for drafter in self._drafters:
            drafter.observe(step)

    @property
    def off_reason(self) -> str | None:
        """Reason why nothing is drafted now; None while drafts are on."""
        return self._records.off_reason

    def on_verified(self, sequence: Sequence, accepted: ListOf[int]) -> None:
        """Record the result of a sequence's draft.

        Args:
            sequence: the sequence, with its draft.
            accepted: accepted draft tokens, and the token that was sampled after them.
        """
        num_accepted = accepted_length(sequence.draft, accepted)
        self._records.on_verified(sequence.drafts, sequence.draft, num_accepted)
        self._has_accepted |= bool(num_accepted)

    def wants_decision(self, sequences: ListOf[Sequence], others_decode: bool) -> bool:
        """Return whether to decide on drafts before the next step. Call it after each step that is launched ahead.

        Args:
            sequences: sequences that sample a token in that step.
            others_decode: whether other batches decode.
        """
        if not sequences:
            return False
        self._steps_ahead += 1
        self._pause -= 1
        if self._pause > 0:
            return False
        load = _load(sequences, others_decode)
        if load.sequences >= MAX_STEP_TOKENS:
            self._records.off = Off(load, None)
            return False
        if self._records.times.num_samples(load, load.sequences) < MIN_SAMPLES:
            return False
        needed = needed_chance(self._records.times, load, self._max_tokens)
        is_probe_due = self._is_probe_due(load)
        if needed >= 1 and not is_probe_due:
            self._records.off = Off(load, 1.0)
            return False
        candidates = [self._best_ahead(sequence) for sequence in sequences]
        first_chance = max((candidate.chances[0] for candidate in candidates if candidate), default=None)
        if _can_continue(sequences):
            self._records.off = Off(load, first_chance)
        if first_chance is None or is_probe_due:
            return is_probe_due and first_chance is not None
        return first_chance > needed and self._plan(candidates, load).gain > START_GAIN

    def decide(self, sequences: ListOf[Sequence], others_decode: bool) -> Decision:
        """Decide on the drafts of the next step.

        Args:
            sequences: sequences whose last token is known; at least one.
            others_decode: whether other batches decode.
        """
        load = _load(sequences, others_decode)
        candidates = [self._best(sequence) for sequence in sequences]
        for sequence in sequences:
            sequence.drafts.trial = None
        if load.sequences >= MAX_STEP_TOKENS:
            self._records.off = Off(load, None)
            return self._run_ahead(load, 0)
        if not any(candidates):
            return self._without_candidates(load, _can_continue(sequences))
        if self._records.times.num_samples(load, load.sequences) < MIN_SAMPLES or self._count_until_refresh():
            return self._run_ahead(load, REFRESH_STEPS)
        plan = self._plan(candidates, load)
        continues_probe = 0 < self._num_probes < MAX_PROBES and self._has_accepted
        is_probe = plan.gain <= STAY_GAIN and (continues_probe or self._is_probe_due(load))
        if plan.gain <= STAY_GAIN and not is_probe:
            self._records.off = Off(load, max(candidate.chances[0] for candidate in candidates if candidate))
            self._probe_steps = min(2 * self._probe_steps, MAX_PROBE_STEPS)
            return self._run_ahead(load, 0 if self._num_probes else self._next_pause())
        if not is_probe:
            self._probe_steps, self._pause_steps = FIRST_PROBE_STEPS, FIRST_PAUSE_STEPS
            self._records.off = None
        self._steps_ahead = self._steps_without_offer = 0
        self._num_probes, self._has_accepted = self._num_probes + 1 if is_probe else 0, False
        return Decision(tuple(self._draft(sequences, candidates, plan)), is_drafting=True)

    def _is_probe_due(self, load: Load) -> bool:
        """Return whether to run a probe now."""
        if self._steps_ahead < FIRST_PROBE_STEPS:
            return False
        cost = 2 * (self._records.times.ratio(load, 2 * load.sequences) - 1)  # in steps, with those before and after
        return self._steps_ahead >= min(self._probe_steps, max(cost / PROBE_SHARE, FIRST_PROBE_STEPS))

    def _without_candidates(self, load: Load, can_continue: bool) -> Decision:
        """Return the decision if there is nothing to draft now. After a good draft, wait a few steps for the next."""
        self._steps_without_offer += 1
        if self._has_accepted and self._steps_without_offer <= LINGER_STEPS:
            return Decision(((),) * load.sequences, is_drafting=True)
        if can_continue:
            self._records.off = Off(load, None)
        return self._run_ahead(load, 0 if self._has_accepted else self._next_pause())

    def _next_pause(self) -> int:
        """Return the number of steps to wait after a useless switch to drafts, and double the next one."""
        pause, self._pause_steps = self._pause_steps, min(2 * self._pause_steps, MAX_PAUSE_STEPS)
        return pause

    def _run_ahead(self, load: Load, pause: int) -> Decision:
        """Return the decision to run without drafts, for at least `pause` steps."""
        self._pause = pause
        self._num_probes, self._has_accepted = 0, False
        self._steps_ahead = self._steps_without_offer = 0
        return Decision(((),) * load.sequences, is_drafting=False)

    def _count_until_refresh(self) -> bool:
        """Count a step with drafts; return whether to measure steps without drafts instead."""
        self._steps_with_drafts += 1
        if self._steps_with_drafts < self._refresh_steps:
            return False
        self._steps_with_drafts = 0
        self._refresh_steps = min(2 * self._refresh_steps, MAX_REFRESH_STEPS)
        return True

    def _best(self, sequence: Sequence, known: Candidate | None = None) -> Candidate | None:
        """Return the offer with the most expected tokens.

        Args:
            sequence: sequence to draft for.
            known: candidate of one of the drafters, if it is already known; this drafter makes no other offer.
        """
        limit = min(self._max_tokens, sequence.remaining_tokens - 1)
        candidates = [] if known is None else [known]
        for drafter in self._drafters if limit > 0 else []:
            if known is None or known.drafter is not drafter:
                offer = drafter.offer(sequence, limit)
                candidates += [] if offer is None else [self._candidate(drafter, offer, sequence)]
        return max(candidates, key=lambda candidate: sum(candidate.chances), default=None)

    def _candidate(self, drafter: Drafter, offer: Offer, sequence: Sequence) -> Candidate:
        acceptance = self._records.acceptance(sequence.drafts, offer.source)
        return Candidate(drafter, offer, acceptance.chances(offer.length))

    def _best_ahead(self, sequence: Sequence) -> Candidate | None:
        """Return the best offer for a sequence that runs ahead; advance its trial, at no cost."""
        drafts = sequence.drafts
        trial = drafts.trial
        if trial is not None:
            tokens = sequence.tokens[trial.start :]
            num_accepted = accepted_length(trial.offer.tokens, tokens)
            if num_accepted == len(tokens) < len(trial.offer.tokens):
                rest = trial.offer.tokens[num_accepted:]
                offer = Offer(trial.offer.source, len(rest), rest)
                return self._best(sequence, self._candidate(trial.drafter, offer, sequence))
            self._records.acceptance(drafts, trial.offer.source).record(len(trial.offer.tokens), num_accepted)
            drafts.trial = None
        best = self._best(sequence)
        if best is not None and best.offer.tokens:
            drafts.trial = Trial(best.drafter, best.offer, len(sequence.tokens))
        return best

    def _plan(self, candidates: ListOf[Candidate | None], load: Load) -> DraftPlan:
        """Return the best lengths of drafts; there must be at least one offer."""
        records = self._records
        return plan_drafts(
            [[] if candidate is None else candidate.chances for candidate in candidates],
            [0.0 if candidate is None else records.draft_s(candidate.offer.source) for candidate in candidates],
            lambda count: records.times.seconds(load, load.sequences + count),
        )

    def _draft(self, sequences: ListOf[Sequence], candidates: ListOf[Candidate | None], plan: DraftPlan) -> list[Draft]:
        """Return the drafts of all sequences, of the planned lengths."""
        drafts: list[Draft] = [()] * len(sequences)
        for drafter in self._drafters:
            chosen = [
                (index, candidate.offer)
                for index, candidate in enumerate(candidates)
                if candidate is not None and candidate.drafter is drafter and plan.lengths[index]
            ]
            if not chosen:
                continue
            began = time.perf_counter()
            requests = [(sequences[index], offer, plan.lengths[index]) for index, offer in chosen]
            new_drafts = drafter.draft(requests)
            seconds = time.perf_counter() - began
            self.clock.exclude(seconds)
            self._records.on_drafted(chosen[0][1].source, max(plan.lengths[index] for index, _ in chosen), seconds)
            for (index, offer), draft in zip(chosen, new_drafts, strict=True):
                sequences[index].drafts.offer = offer
                drafts[index] = tuple(sequences[index].until_stop(list(draft)))
        return drafts


def _load(sequences: ListOf[Sequence], others_decode: bool) -> Load:
    return Load.of([len(sequence.tokens) for sequence in sequences], others_decode)


def _can_continue(sequences: ListOf[Sequence]) -> bool:
    """Return whether there may be drafts for a sequence: more than one token may still be generated."""
    return any(sequence.remaining_tokens > 1 for sequence in sequences)
