"""Drafts by a draft model (kimi_mlx.model.draft_model), for several sequences at once.

Draft tokens are sampled with the same random numbers as the model's tokens at their positions, and with the same bias,
grammar and sampling parameters. A draft token is accepted if it equals the model's token. So the text is the same as
without drafts, and acceptance is close to the maximum for the two distributions.
Source: Daliri, Musco and Suresh 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding"
(https://arxiv.org/abs/2408.07978).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from kimi_mlx.engine.drafts.draft_cache import DraftCache
from kimi_mlx.engine.drafts.drafter import Draft, Offer
from kimi_mlx.model.draft_model import DraftModel

if TYPE_CHECKING:
    from kimi_mlx.engine.sequence import Sequence
    from kimi_mlx.engine.step_runner import InFlightStep

MAX_UNREAD = 64
"""Maximum number of captured states of a sequence that wait for the next draft."""

MAX_LATE = 4
"""Maximum number of steps without logits whose captured states are not kept yet; about the number of ranks."""

SOURCE = "draft model"


@dataclass
class _Job:
    """A draft in progress.

    Args:
        index: index of the request.
        sequence: the sequence.
        length: number of draft tokens.
        positions: positions of the rows to compute first.
        states: captured states of these rows, (1, L, width).
    """

    index: int
    sequence: Sequence
    length: int
    positions: list[int]
    states: mx.array

    @property
    def cache(self) -> DraftCache:
        """Draft model's cache of the sequence."""
        return draft_cache_of(self.sequence)


class ModelDrafter:
    """Drafts by a draft model.

    Args:
        model: the draft model.
    """

    def __init__(self, model: DraftModel):
        self._model = model
        self._late: deque[InFlightStep] = deque()

    def offer(self, sequence: Sequence, limit: int) -> Offer | None:
        """Offer a draft of the maximum length: the draft model can always propose."""
        return Offer(SOURCE, limit)

    def observe(self, step: InFlightStep) -> None:
        """Keep the captured states of a step; read them if there are many.

        In a pipeline the states of a step without logits arrive after the step has ended on this rank. They are kept
        together with those of a later step, so that this rank does not wait for ranks that still compute chunks.
        """
        if step.captured is None:
            return
        self._late.append(step)
        while self._late and (step.num_logits or len(self._late) > MAX_LATE):
            self._keep_states(self._late.popleft())

    def _keep_states(self, step: InFlightStep) -> None:
        """Keep the captured states of the sequences of a step."""
        assert step.captured is not None
        states = step.captured.array()
        first = 0
        for entry in step.entries:
            sequence, start = entry.sequence, entry.start
            stop = min(start + entry.length, len(sequence.tokens) - 1)  # rejected draft tokens are not in `tokens`
            if entry.is_alive and stop > start:
                cache = draft_cache_of(sequence)
                cache.add(start, states[:, first : first + stop - start])
                if cache.num_unread > MAX_UNREAD:
                    self._read_states(sequence)
            first += entry.length

    def draft(self, requests: ListOf[tuple[Sequence, Offer, int]]) -> list[Draft]:
        """Return drafts; each pass of the draft model gives one draft token of every sequence."""
        drafts: list[list[mx.array]] = [[] for _ in requests]
        jobs: list[_Job] = []
        for index, (sequence, _, length) in enumerate(requests):
            last = len(sequence.tokens) - 2
            taken = draft_cache_of(sequence).take(last + 1)
            if taken is not None and taken[0][-1] == last:
                jobs.append(_Job(index, sequence, length, *taken))
        jobs.sort(key=lambda job: -job.length)
        outputs = self._first_outputs(jobs) if jobs else mx.zeros((1, 0, 0))
        count = 0
        while jobs:
            jobs, tokens, outputs = self._sample(jobs, outputs, drafts)
            count += 1
            num_left = sum(job.length > count for job in jobs)
            jobs, tokens, outputs = jobs[:num_left], tokens[:num_left], outputs[:, :num_left]
            if jobs:
                outputs = self._next_outputs(outputs, tokens, jobs, count)
        mx.eval(drafts)
        allowed: list[Draft] = []
        for (sequence, _, _), draft in zip(requests, drafts, strict=True):
            draft_cache_of(sequence).truncate(len(sequence.tokens))
            allowed.append(sequence.sampler.allowed_prefix([cast(int, token.item()) for token in draft]))
        return allowed

    def _read_states(self, sequence: Sequence) -> None:
        """Read all states but the last one, from which the next draft begins."""
        cache = draft_cache_of(sequence)
        taken = cache.take(len(sequence.tokens) - 2)
        if taken is not None:
            self._first_outputs([_Job(0, sequence, 0, *taken)])
            mx.async_eval(cache.rows.state)

    def _first_outputs(self, jobs: list[_Job]) -> mx.array:
        """Compute the rows of captured states; return the output of the last one of each sequence, (1, N, D)."""
        model = self._model
        ids = [id for job in jobs for id in job.sequence.input_ids([position + 1 for position in job.positions])]
        states = model.fuse(mx.concatenate([job.states for job in jobs], axis=1))
        layout = model.layout(
            [(job.cache.rows.offset, len(job.positions)) for job in jobs],
            [position for job in jobs for position in job.positions],
        )
        embeddings = model.embed(mx.array([ids]))
        outputs = model(embeddings, states, [job.cache.rows for job in jobs], layout, [1] * len(jobs))
        for job in jobs:
            job.cache.positions += job.positions
        return outputs

    def _next_outputs(self, outputs: mx.array, tokens: mx.array, jobs: list[_Job], count: int) -> mx.array:
        """Compute the rows after `count` draft tokens: from the last outputs (1, N, D) and tokens (N,)."""
        model = self._model
        positions = [len(job.sequence.tokens) - 2 + count for job in jobs]
        layout = model.layout([(job.cache.rows.offset, 1) for job in jobs], positions)
        for job, position in zip(jobs, positions, strict=True):
            job.cache.positions.append(position)
        return model(model.embed(tokens[None]), outputs, [job.cache.rows for job in jobs], layout)

    def _sample(
        self, jobs: list[_Job], outputs: mx.array, drafts: list[list[mx.array]]
    ) -> tuple[list[_Job], mx.array, mx.array]:
        """Append the next draft token of each job to its draft.

        Args:
            jobs: N jobs.
            outputs: (1, N, D), last outputs.
            drafts: drafts of all requests so far.

        Returns:
            The M jobs that continue, because their grammars have not failed; their tokens (M,) and outputs (1, M, D).
        """
        logits = self._model.logits(outputs)[0]
        if all(job.sequence.sampler.is_greedy() for job in jobs):
            tokens = self._model.to_token_ids(mx.argmax(logits, axis=-1))
            for row, job in enumerate(jobs):
                drafts[job.index].append(tokens[row : row + 1])
            return jobs, tokens, outputs
        logits = self._model.scatter(logits)
        rows: list[int] = []
        for row, job in enumerate(jobs):
            draft, length = drafts[job.index], len(job.sequence.tokens)
            token = job.sequence.sampler.sample_draft(logits[row : row + 1], length, draft)
            if token is not None:
                draft.append(token)
                rows.append(row)
        left = [jobs[row] for row in rows]
        tokens = mx.concatenate([drafts[job.index][-1] for job in left]) if left else mx.zeros((0,), mx.int32)
        return left, tokens, outputs[:, mx.array(rows)] if len(rows) < len(jobs) else outputs


def draft_cache_of(sequence: Sequence) -> DraftCache:
    """Return the draft model's cache of a running sequence."""
    assert sequence.cache is not None
    assert sequence.cache.draft is not None
    return sequence.cache.draft
