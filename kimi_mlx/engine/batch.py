"""Continuous batching: each step holds one token of every decoding sequence and chunks of the prompts in prefill.

Two modes. Ahead: step t+1 is launched on the unread tokens of step t; results of finished sequences are discarded. With
drafts: the tokens of step t are read first, because the next drafts depend on them; then the leader decides, and sends
its decision to all ranks (kimi_mlx.engine.drafts.decision). This mode begins with a flag in the header of a step, so
running ahead costs no message, and ends with a decision. All ranks read the same headers and decisions at the same
steps, so they always agree on the mode.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import mlx.core as mx

from kimi_mlx.engine.batch_entry import BatchEntry
from kimi_mlx.engine.drafts.decision import Decision, decode, encode, max_size
from kimi_mlx.engine.drafts.planner import DraftPlanner
from kimi_mlx.engine.drafts.step_times import Load
from kimi_mlx.engine.events import Event, FinishReason, Prefilled, PromptLogprobs
from kimi_mlx.engine.feature_store import FeatureStore
from kimi_mlx.engine.kv_cache_pool import KVCachePool
from kimi_mlx.engine.prefill_order import PrefillOrder
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.step_runner import InFlightStep, StepRunner
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.parallel.communicator import LeaderState
from kimi_mlx.sizing.step_time import ChunkBudget, ChunkEstimate

LONG_STEP = 64
"""Steps of at least this many tokens finish before the next one starts, because they need much temporary memory."""

Events = Iterator[tuple[int, Event | KimiMlxError]]
"""Pairs of a request id and an event of that request."""


class Batch:
    """A set of sequences that run together, and their step in flight.

    Args:
        runner: runs the steps on this rank.
        pool: pool of the KV caches.
        features: features of images.
        on_header: callback for the leader's state of each step.
        chunk: maximum number of prompt tokens per step.
        estimate: estimates the time of chunks while other sequences decode; None to make them as long as other chunks.
        speculate: maximum number of draft tokens per step and sequence.
        planner: decides on drafts; None without drafts, and on ranks other than the leader.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: KVCachePool,
        features: FeatureStore,
        on_header: Callable[[LeaderState], None],
        chunk: int,
        estimate: ChunkEstimate | None,
        speculate: int = 0,
        planner: DraftPlanner | None = None,
    ):
        self._runner, self._pool, self._features, self._on_header = runner, pool, features, on_header
        self._chunk, self._estimate, self._speculate, self._planner = chunk, estimate, speculate, planner
        self._is_drafting = self._wants_decision = False
        self.members: list[Sequence] = []
        self._in_flight: InFlightStep | None = None
        self._order = PrefillOrder()
        self._has_encoded = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.members and self._in_flight is None

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt is in prefill, so that steps take long."""
        is_long = self._in_flight is not None and self._in_flight.length >= LONG_STEP
        return is_long or any(member.num_computed_tokens < len(member.tokens) for member in self.members)

    @property
    def is_decoding(self) -> bool:
        """Whether a sequence decodes, so that long steps delay its answer."""
        return any(member.num_computed_tokens >= len(member.tokens) for member in self.members)

    @property
    def num_in_step(self) -> int:
        """Number of sequences in the step in flight."""
        return 0 if self._in_flight is None else len(self._in_flight.entries)

    @property
    def growth(self) -> int:
        """Maximum number of tokens that the next step adds to the caches; prompts count in full from the start."""
        return sum(
            member.padded_length(min(2 + self._speculate, member.remaining_tokens)) - member.padded_length(0)
            for member in self.members
        )

    def choose_encoding(self) -> bool:
        """Choose the next step: return True for a part of an image, False for chunks. If there are both, alternate."""
        self._has_encoded = not (self._has_encoded and self._prefillable())
        if self._has_encoded and self._planner is not None:
            self._planner.clock.stop()
        return self._has_encoded

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence and return its cache to the pool."""
        self.members.remove(sequence)
        self._pool.release(sequence.end())

    def remove_all(self) -> None:
        """Discard the step in flight and remove all sequences; their caches return to the pool.

        Only allowed on a single rank.
        """
        self._in_flight = None
        while self.members:
            self.remove(self.members[-1])

    def discard_all(self) -> None:
        """Discard the step in flight and all sequences, with their caches."""
        self._in_flight = None
        self.members.clear()

    def step(self, others_decode: bool = False, *, has_chunks: bool = True) -> Events:
        """Launch a step and yield the events of the previous one. The caller must exhaust the iterator.

        Args:
            others_decode: whether sequences of other batches decode.
            has_chunks: whether the step may contain chunks of prompts.

        Raises:
            RingError: a rank is lost.
        """
        previous = self._in_flight
        if previous is not None:
            if previous.length >= LONG_STEP:
                self._runner.wait(previous)
            self._runner.sample(previous, self._wants_decision)
        if self._is_drafting and previous is not None and previous.num_logits:
            yield from self._step_with_drafts(previous, others_decode, has_chunks)
        else:
            yield from self._step_ahead(previous, others_decode, has_chunks)
        if self._in_flight is None and previous is not None and previous.captured is not None:
            previous.captured.receive()  # otherwise the last rank of a pipeline waits until the next step

    def _step_ahead(self, previous: InFlightStep | None, others_decode: bool, has_chunks: bool) -> Events:
        """Launch a step on the unread tokens of the previous one, then read these."""
        entries = self._entries_ahead(previous)
        chunks = self._chunks(entries, others_decode) if has_chunks else []
        self._in_flight = self._start(entries + chunks, previous, self._wants_decision)
        if previous is not None:
            yield from self._read(previous, self._in_flight, others_decode)
        self._wants_decision = False
        if self._planner is not None and self._in_flight is not None and not self._is_drafting:
            sampling = [entry.sequence for entry in self._in_flight.entries if entry.num_logits and entry.is_alive]
            self._wants_decision = self._planner.wants_decision(sampling, others_decode)
            # A single rank has no header to wait for.
            self._is_drafting = self._wants_decision and self._runner.communicator is None

    def _step_with_drafts(self, previous: InFlightStep, others_decode: bool, has_chunks: bool) -> Events:
        """Read the tokens of the previous step, and launch one with the drafts that the leader decides on."""
        sampled, state = self._runner.read(previous)
        self._on_header(state)
        self._record_time(previous, others_decode, with_drafts=True)
        pipeline, size = self._runner.pipeline, max_size(len(previous.entries), len(self.members), self._speculate)
        decision: Decision | None = None
        received: list[list[int]] | None = None
        if pipeline is not None and not self._runner.has_head:
            received, decision = decode(pipeline.recv_numbers(size))
        accepted = yield from self._accept(previous, sampled, received)
        sequences = self._known_sequences()
        if decision is None:
            decision = self._decide(sequences, others_decode)
            if pipeline is not None:
                pipeline.send_numbers(encode(accepted, decision), size)
        for sequence, draft in zip(sequences, decision.drafts, strict=True):
            sequence.draft = draft
        self._is_drafting, self._wants_decision = decision.is_drafting, False
        entries = self._entries_with_drafts(sequences)
        chunks = self._chunks(entries, others_decode) if has_chunks else []
        self._in_flight = self._start(entries + chunks, None)

    def _decide(self, sequences: list[Sequence], others_decode: bool) -> Decision:
        """Return the decision of the leader. Ranks that sum receive it here."""
        if not sequences:
            return Decision((), is_drafting=True)
        decision = None if self._planner is None else self._planner.decide(sequences, others_decode)
        if self._runner.communicator is not None and self._runner.pipeline is None:
            message = [0] * max_size(0, len(sequences), self._speculate)
            if decision is not None:
                numbers = encode([], decision)
                message[: len(numbers)] = numbers
            _, decision = decode(self._runner.communicator.broadcast(message))
        assert decision is not None
        return decision

    def _start(
        self, entries: list[BatchEntry], previous: InFlightStep | None, wants_decision: bool = False
    ) -> InFlightStep | None:
        return self._runner.start(entries, previous, wants_decision) if entries else None

    def _entries_ahead(self, previous: InFlightStep | None) -> list[BatchEntry]:
        """Return entries for the sequences that the previous step samples."""
        entries: list[BatchEntry] = []
        continued = [
            (*entry.sequence.attention_order, index, entry)
            for index, entry in enumerate([] if previous is None else previous.entries)
            if entry.num_logits and entry.is_alive and entry.sequence.remaining_tokens > 1
        ]
        # See kimi_mlx.model.batch_layout.DecodeGroup.
        for *_, index, entry in sorted(continued, key=lambda item: item[:3]):
            sequence = entry.sequence
            sequence.num_computed_tokens += 1
            position = sequence.num_computed_tokens
            entries.append(BatchEntry(sequence, entry.epoch, 1, 1, position, len(entries), previous_entry=index))
        return entries

    def _known_sequences(self) -> list[Sequence]:
        """Return the sequences whose last token is known and not computed, in the order of their attention."""
        known = [
            member
            for member in self.members
            if member.generated and member.num_computed_tokens == len(member.tokens) - 1
        ]
        return sorted(known, key=lambda member: member.attention_order)

    def _entries_with_drafts(self, sequences: list[Sequence]) -> list[BatchEntry]:
        """Return entries for sequences whose last token is known, each with its draft."""
        entries: list[BatchEntry] = []
        num_logits = 0
        for sequence in sequences:
            draft, position = sequence.draft, len(sequence.tokens)
            tokens = (*sequence.next_chunk(1), *draft)
            sequence.num_computed_tokens += len(draft)
            length = len(tokens)
            entries.append(
                BatchEntry(sequence, sequence.epoch, length, length, position, num_logits, tokens, draft=draft)
            )
            num_logits += length
        return entries

    def _chunks(self, decoding: list[BatchEntry], others_decode: bool) -> list[BatchEntry]:
        """Return chunks of prompts, in the order of PrefillOrder: fewer tokens while others decode.

        Args:
            decoding: entries that come first in the step; all need logits.
            others_decode: whether sequences of other batches decode.
        """
        entries: list[BatchEntry] = []
        num_logits = sum(entry.num_logits for entry in decoding)
        budget = ChunkBudget(self._chunk, self._estimate if num_logits or others_decode else None)
        for sequence in self._order.next_prompts(self._prefillable()):
            start = sequence.num_computed_tokens
            stop = min(start + budget.largest(start), self._ready_length(sequence))
            if stop == start:
                break
            features = self._features.rows_between(sequence.pending_images, start, stop)
            tokens = sequence.next_chunk(stop - start)
            budget.take(start, len(tokens))
            is_last = int(sequence.num_computed_tokens == len(sequence.tokens))
            position = sequence.num_computed_tokens + 1 - is_last
            entries.append(
                BatchEntry(
                    sequence,
                    sequence.epoch,
                    len(tokens),
                    is_last,
                    position,
                    num_logits,
                    tokens,
                    is_prefill=True,
                    features=features,
                    num_prompt_logits=sequence.num_prompt_logits(start, stop),
                )
            )
            num_logits += is_last
            self._order.record(sequence)
        return entries

    def _prefillable(self) -> list[Sequence]:
        """Return the sequences with prompt tokens that can be computed now."""
        return [member for member in self.members if member.num_computed_tokens < self._ready_length(member)]

    def _ready_length(self, sequence: Sequence) -> int:
        return self._features.ready_length(sequence.pending_images, len(sequence.tokens))

    def _read(self, step: InFlightStep, following: InFlightStep | None, others_decode: bool) -> Events:
        """Yield the events of a step after the next step was launched."""
        sampled, state = self._runner.read(step, following)
        self._on_header(state)
        self._is_drafting |= state.wants_decision
        self._record_time(step, others_decode, with_drafts=False)
        continued = set() if following is None else {entry.previous_entry for entry in following.entries}
        for index, entry in enumerate(step.entries):
            sequence = entry.sequence
            if not entry.is_alive:
                continue
            yield from self._on_prefilled(step, index)
            if not entry.num_logits or not entry.is_alive:
                continue
            if index not in sampled:  # the last token of a sequence, which only the leader knows
                yield self._finish(sequence, "length")
                continue
            yield from self._append(step, entry, sampled[index])
            if (reason := sequence.reason) is not None:
                yield self._finish(sequence, reason)
            elif index in continued:
                assert sequence.cache is not None
                sequence.cache.tokens += sampled[index]
        if self._planner is not None:
            self._planner.observe(step)

    def _accept(
        self, step: InFlightStep, sampled: dict[int, list[int]], received: list[list[int]] | None
    ) -> Generator[tuple[int, Event | KimiMlxError], None, list[list[int]]]:
        """Accept draft tokens: yield the events of a step, return the accepted tokens of each entry with logits.

        Args:
            step: the step.
            sampled: sampled tokens by index of their entry.
            received: accepted tokens, on ranks that do not sample.
        """
        all_accepted: list[list[int]] = []
        for index, entry in enumerate(step.entries):
            sequence = entry.sequence
            if not entry.is_alive:
                continue
            yield from self._on_prefilled(step, index)
            if not entry.num_logits or not entry.is_alive:
                continue
            accepted = sequence.accept(sampled[index]) if received is None else received[len(all_accepted)]
            all_accepted.append(accepted)
            if self._planner is not None:
                self._planner.on_verified(sequence, accepted)
            sequence.rollback_draft(accepted)
            yield from self._append(step, entry, accepted)
            if (reason := sequence.reason) is not None:
                yield self._finish(sequence, reason)
        if self._planner is not None:
            self._planner.observe(step)
        return all_accepted

    def _record_time(self, step: InFlightStep, others_decode: bool, *, with_drafts: bool) -> None:
        """Record the time of a step whose results are available; only on the leader."""
        if self._planner is not None:
            is_decoding = not any(entry.is_prefill for entry in step.entries)
            load = Load.of([entry.position for entry in step.entries], others_decode) if is_decoding else None
            self._planner.clock.on_results(load, step.length, with_drafts)

    def _append(self, step: InFlightStep, entry: BatchEntry, tokens: list[int]) -> Events:
        """Append sampled tokens to their sequence."""
        sampled = step.sampled
        rows = range(entry.logits_start, entry.logits_start + len(tokens))
        count = entry.sequence.request.top_logprobs
        logprobs = [None if sampled is None else sampled.logprobs_at(row, count) for row in rows]
        for token in entry.sequence.append(tokens, logprobs):
            yield entry.sequence.request_id, token

    def _on_prefilled(self, step: InFlightStep, index: int) -> Events:
        """Yield the events of a chunk of a prompt: log probabilities, progress, and the end for `max_tokens` 0."""
        entry = step.entries[index]
        sequence = entry.sequence
        if not entry.is_prefill or sequence.generated:
            return
        if entry.num_prompt_logits:
            start, sequence.next_logprob = sequence.next_logprob, sequence.next_logprob + entry.num_prompt_logits
            if step.sampled is not None:
                logprobs = step.sampled.prompt_logprobs_of(step.entries, index)
                yield sequence.request_id, PromptLogprobs(start, logprobs)
        yield sequence.request_id, Prefilled(entry.stop, len(sequence.request.prompt))
        if not sequence.max_tokens and entry.num_logits:  # the sampled token is not needed
            yield self._finish(sequence, "length")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> tuple[int, Event | KimiMlxError]:
        self.remove(sequence)
        drafts_off = None if self._planner is None else self._planner.off_reason
        event = sequence.sampler.failure or sequence.finished(reason, mx.get_peak_memory(), drafts_off)
        return sequence.request_id, event
