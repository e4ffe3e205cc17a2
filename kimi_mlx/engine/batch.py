"""Continuous batching: each step holds one token of every decoding sequence and chunks of the prompts in prefill.

Two modes. Without drafts, step t+1 is launched on the unread tokens of step t; results of finished sequences are
discarded. With drafts, the tokens of step t are read first, because the next drafts depend on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

from kimi_mlx.engine.batch_entry import BatchEntry
from kimi_mlx.engine.events import Event, FinishReason, Prefilled
from kimi_mlx.engine.feature_store import FeatureStore
from kimi_mlx.engine.kv_cache_pool import KVCachePool, padded_length
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.step_runner import InFlightStep, StepRunner
from kimi_mlx.errors import KimiMlxError
from kimi_mlx.parallel.communicator import LeaderState
from kimi_mlx.sizing.step_time import ChunkBudget, ChunkEstimate

SHORT_PROMPT = 64
"""Prompts with at most this many tokens left are prefilled before long ones in every other step."""

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
        estimate: estimates the time of chunks beside decoding.
        speculate: maximum number of draft tokens per step and sequence.
    """

    def __init__(
        self,
        runner: StepRunner,
        pool: KVCachePool,
        features: FeatureStore,
        on_header: Callable[[LeaderState], None],
        chunk: int,
        estimate: ChunkEstimate,
        speculate: int,
    ):
        self._runner, self._pool, self._features, self._on_header = runner, pool, features, on_header
        self._chunk, self._estimate, self._speculate = chunk, estimate, speculate
        self.members: list[Sequence] = []
        self._in_flight: InFlightStep | None = None
        self._has_put_short_first = self._has_encoded = False

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
        """Whether a prompt is computed, so that its answer waits for long steps."""
        return any(member.num_computed_tokens >= len(member.tokens) for member in self.members)

    @property
    def growth(self) -> int:
        """Maximum number of tokens that the next step adds to the caches; prompts count in full from the start."""
        lengths = [(len(member.tokens), min(2 + self._speculate, member.remaining_tokens)) for member in self.members]
        return sum(padded_length(length + new) - padded_length(length) for length, new in lengths)

    def choose_encoding(self) -> bool:
        """Choose the next step: return True for a part of an image, False for chunks. If there are both, alternate."""
        self._has_encoded = not (self._has_encoded and self._prefillable())
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
        if previous is not None and previous.length >= LONG_STEP:
            self._runner.wait(previous)
        if previous is not None:
            self._runner.sample(previous)
        if self._speculate:
            if previous is not None:
                yield from self._read_drafts(previous)
            entries = self._entries_with_drafts()
            chunks = self._chunks(entries, others_decode) if has_chunks else []
            self._in_flight = self._start(entries + chunks, None)
        else:
            entries = self._entries_ahead(previous)
            chunks = self._chunks(entries, others_decode) if has_chunks else []
            self._in_flight = self._start(entries + chunks, previous)
            if previous is not None:
                yield from self._read(previous, self._in_flight)

    def _start(self, entries: list[BatchEntry], previous: InFlightStep | None) -> InFlightStep | None:
        return self._runner.start(entries, previous) if entries else None

    def _entries_ahead(self, previous: InFlightStep | None) -> list[BatchEntry]:
        """Return entries for the sequences that the previous step samples."""
        entries: list[BatchEntry] = []
        continued = [
            (entry.sequence.num_computed_tokens, index, entry)
            for index, entry in enumerate([] if previous is None else previous.entries)
            if entry.num_logits and entry.is_alive and entry.sequence.remaining_tokens > 1
        ]
        # By length: see kimi_mlx.model.batch_layout.DecodeGroup.
        for _, index, entry in sorted(continued, key=lambda item: item[:2]):
            sequence = entry.sequence
            sequence.num_computed_tokens += 1
            position = sequence.num_computed_tokens
            entries.append(BatchEntry(sequence, entry.epoch, 1, 1, position, len(entries), previous_entry=index))
        return entries

    def _entries_with_drafts(self) -> list[BatchEntry]:
        """Return entries for the sequences whose last token is known, each with its draft."""
        entries: list[BatchEntry] = []
        num_logits = 0
        for sequence in sorted(self.members, key=lambda member: member.num_computed_tokens):
            if sequence.generated and sequence.num_computed_tokens == len(sequence.tokens) - 1:
                draft = sequence.draft
                tokens = (*sequence.next_chunk(1), *draft)
                sequence.num_computed_tokens += len(draft)
                length, position = len(tokens), len(sequence.tokens)
                entries.append(
                    BatchEntry(sequence, sequence.epoch, length, length, position, num_logits, tokens, draft=draft)
                )
                num_logits += length
        return entries

    def _chunks(self, decoding: list[BatchEntry], others_decode: bool) -> list[BatchEntry]:
        """Return chunks of prompts: fewer tokens while others decode. Scheduled sequences move to the end.

        Args:
            decoding: entries of the step before these, which all need logits.
            others_decode: whether sequences of other batches decode.
        """
        entries: list[BatchEntry] = []
        num_logits = sum(entry.num_logits for entry in decoding)
        budget = ChunkBudget(self._chunk, self._estimate if num_logits or others_decode else None)
        unread = self._prefillable()
        short = [member for member in unread if len(member.tokens) - member.num_computed_tokens <= SHORT_PROMPT]
        self._has_put_short_first = 0 < len(short) < len(unread) and not self._has_put_short_first
        for sequence in short if self._has_put_short_first else unread:
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
                )
            )
            num_logits += is_last
            self.members.remove(sequence)
            self.members.append(sequence)
        return entries

    def _prefillable(self) -> list[Sequence]:
        """Return the sequences with prompt tokens that can be computed now."""
        return [member for member in self.members if member.num_computed_tokens < self._ready_length(member)]

    def _ready_length(self, sequence: Sequence) -> int:
        return self._features.ready_length(sequence.pending_images, len(sequence.tokens))

    def _read(self, step: InFlightStep, following: InFlightStep | None) -> Events:
        """Yield the events of a step after the next step was launched."""
        sampled, state = self._runner.read(step, following)
        self._on_header(state)
        continued = set() if following is None else {entry.previous_entry for entry in following.entries}
        for index, entry in enumerate(step.entries):
            sequence = entry.sequence
            if not entry.is_alive:
                continue
            yield from _progress(entry)
            if not entry.num_logits:
                continue
            if index not in sampled:  # a last token, which only the leader knows
                yield self._finish(sequence, "length")
                continue
            yield from self._append(step, entry, sampled[index])
            if (reason := sequence.reason) is not None:
                yield self._finish(sequence, reason)
            elif index in continued:
                assert sequence.cache is not None
                sequence.cache.tokens += sampled[index]

    def _read_drafts(self, step: InFlightStep) -> Events:
        """Yield the events of a step, with the accepted draft tokens, and prepare the next drafts."""
        sampled, state = self._runner.read(step)
        self._on_header(state)
        alive = [(index, entry) for index, entry in enumerate(step.entries) if entry.is_alive]
        with_logits = [(index, entry) for index, entry in alive if entry.num_logits]
        for _, entry in alive:
            yield from _progress(entry)
        if not with_logits:
            return
        has_head = self._runner.has_head
        received = [] if has_head else self._recv_decisions(len(with_logits))
        decisions: list[int] = []
        for index, entry in with_logits:
            sequence = entry.sequence
            if has_head:
                accepted = sequence.accept(sampled[index])
            else:
                count, *received = received
                accepted, received = received[:count], received[count:]
            sequence.rollback_draft(accepted)
            yield from self._append(step, entry, accepted)
            if has_head:
                sequence.draft = sequence.next_draft()
            else:
                count, *received = received
                sequence.draft = (0,) * count
            decisions += [len(accepted), *accepted, len(sequence.draft)]
            if (reason := sequence.reason) is not None:
                yield self._finish(sequence, reason)
        if has_head and self._runner.pipeline is not None:
            self._runner.pipeline.send_numbers(decisions, self._max_decisions(len(with_logits)))

    def _recv_decisions(self, num_entries: int) -> list[int]:
        """Receive from the leader of a pipeline, for each entry, the accepted tokens and the length of its draft."""
        assert self._runner.pipeline is not None
        return self._runner.pipeline.recv_numbers(self._max_decisions(num_entries))

    def _max_decisions(self, num_entries: int) -> int:
        return num_entries * (3 + self._speculate)

    def _append(self, step: InFlightStep, entry: BatchEntry, tokens: list[int]) -> Events:
        """Append sampled tokens to their sequence."""
        sampled = step.sampled
        rows = range(entry.logits_start, entry.logits_start + len(tokens))
        logprobs = [None if sampled is None else sampled.logprobs_at(row) for row in rows]
        for token in entry.sequence.append(tokens, logprobs):
            yield entry.sequence.request_id, token

    def _finish(self, sequence: Sequence, reason: FinishReason) -> tuple[int, Event | KimiMlxError]:
        self.remove(sequence)
        event = sequence.sampler.failure or sequence.finished(reason, mx.get_peak_memory())
        return sequence.request_id, event


def _progress(entry: BatchEntry) -> Events:
    """Yield the progress of the prompt, if the entry is a part of it."""
    sequence = entry.sequence
    if entry.is_prefill and not sequence.generated:
        yield sequence.request_id, Prefilled(entry.position + entry.num_logits - 1, len(sequence.request.prompt))
