"""Sequences whose steps are made together: each step has a token of all that decode, and a chunk of those that prefill.

Two ways. Ahead: a step is started before the tokens of the one before are read; it goes on from them where they lie,
and what turns out to have ended is thrown away. With drafts: tokens are read first, since the drafts follow from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

from kimi_mlx.engine.batch_entry import Row
from kimi_mlx.engine.kv_cache_pool import CacheShelf, room_of
from kimi_mlx.engine.request import Event, FinishReason, Prefilled
from kimi_mlx.engine.sequence import Sequence
from kimi_mlx.engine.steps import Step, Steps
from kimi_mlx.errors import EngineError
from kimi_mlx.parallel.exchange import Said

SHORT_PROMPT = 64
"""What is left of a prompt is short up to so many tokens; it goes before the chunks of long ones, every other step."""

LONG_STEP = 64
"""From this many tokens on a step is waited for before the next one is started: its temporary memory is large."""

Events = Iterator[tuple[int, Event | EngineError]]
"""Each with the number of its request."""


class Batch:
    """Sequences, and their step that is on its way.

    Args:
        steps: how this rank makes steps.
        shelf: of the caches.
        hear: told of everything that the leader says.
        chunk: tokens of prompts a step.
        speculate: tokens drafted a step and sequence at most.
    """

    def __init__(self, steps: Steps, shelf: CacheShelf, hear: Callable[[Said], None], chunk: int, speculate: int):
        self._steps, self._shelf, self._hear = steps, shelf, hear
        self._chunk, self._speculate = chunk, speculate
        self.members: list[Sequence] = []
        self._step: Step | None = None
        self._was_short = False

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.members and self._step is None

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt is being read: steps take long then."""
        is_long = self._step is not None and self._step.length >= LONG_STEP
        return is_long or any(each.fed < len(each.tokens) for each in self.members)

    @property
    def growth(self) -> int:
        """So many tokens the caches may take more in the next step; prompts are counted from their beginning."""
        lengths = [(len(each.tokens), min(2 + self._speculate, each.room)) for each in self.members]
        return sum(room_of(length + new) - room_of(length) for length, new in lengths)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence's run here; what was computed goes to the shelf."""
        self.members.remove(sequence)
        self._shelf.give_back(sequence.end())

    def drop(self) -> None:
        """Forget the step that is on its way, and end all runs; allowed where there are no other ranks."""
        self._step = None
        while self.members:
            self.remove(self.members[-1])

    def abandon(self) -> None:
        """Forget everything, the caches too."""
        self._step = None
        self.members.clear()

    def turn(self) -> Events:
        """Make a step; yields what has come of the one before. To be read to its end.

        Raises:
            RingError: a rank is lost.
        """
        before = self._step
        if before is not None and before.length >= LONG_STEP:
            self._steps.wait(before)
        if before is not None:
            self._steps.draw(before)
        if self._speculate:
            if before is not None:
                yield from self._read_drafts(before)
            self._step = self._start(self._rows(), None)
        else:
            self._step = self._start(self._rows_ahead(before), before)
            if before is not None:
                yield from self._read(before, self._step)

    def _start(self, rows: list[Row], before: Step | None) -> Step | None:
        return self._steps.start(rows, before) if rows else None

    def _rows_ahead(self, before: Step | None) -> list[Row]:
        """Who goes on from a token that is drawn now, then chunks of prompts."""
        rows: list[Row] = []
        going = [
            (row.sequence.fed, at, row)
            for at, row in enumerate([] if before is None else before.rows)
            if row.last and row.is_alive and row.sequence.room > 1
        ]
        for _, at, row in sorted(going, key=lambda each: each[:2]):  # by length: see kimi_mlx.model.step.Stack
            row.sequence.fed += 1
            rows.append(Row(row.sequence, row.run, 1, 1, row.sequence.fed, len(rows), source=at))
        return rows + self._chunks(len(rows))

    def _rows(self) -> list[Row]:
        """Who goes on from a known token, with a draft of those behind it, then chunks of prompts."""
        rows: list[Row] = []
        asked = 0
        for sequence in sorted(self.members, key=lambda each: each.fed):
            if sequence.generated and sequence.fed == len(sequence.tokens) - 1:
                tokens = (*sequence.feed(1), *sequence.draft)
                sequence.fed += len(sequence.draft)
                length, position = len(tokens), len(sequence.tokens)
                rows.append(Row(sequence, sequence.run, length, length, position, asked, tokens, draft=sequence.draft))
                asked += length
        return rows + self._chunks(asked)

    def _chunks(self, asked: int) -> list[Row]:
        """Chunks of prompts, half as large while others wait for their next token; whose turn it was comes last then.

        Args:
            asked: tokens that rows before these draw.
        """
        rows: list[Row] = []
        left = max(self._chunk // 2, 1) if asked else self._chunk
        unread = [each for each in self.members if each.fed < len(each.tokens)]
        short = [each for each in unread if len(each.tokens) - each.fed <= SHORT_PROMPT]
        self._was_short = 0 < len(short) < len(unread) and not self._was_short
        for sequence in short if self._was_short else unread:
            if not left:
                break
            tokens = sequence.feed(left)
            left -= len(tokens)
            last = int(sequence.fed == len(sequence.tokens))
            rows.append(Row(sequence, sequence.run, len(tokens), last, sequence.fed + 1 - last, asked, tokens))
            asked += last
            self.members.remove(sequence)
            self.members.append(sequence)
        return rows

    def _read(self, step: Step, following: Step | None) -> Events:
        """What a step has given, where the next one is on its way already."""
        drawn, said = self._steps.read(step, following)
        self._hear(said)
        goes_on = set() if following is None else {row.source for row in following.rows}
        for at, row in enumerate(step.rows):
            sequence = row.sequence
            if not row.is_alive:
                continue
            yield from _progress(row)
            if not row.last:
                continue
            if at not in drawn:  # a last token, which only the leader knows
                yield self._finish(sequence, "length")
                continue
            yield from self._take(step, row, drawn[at])
            if (reason := sequence.reason) is not None:
                yield self._finish(sequence, reason)
            elif at in goes_on:
                assert sequence.cache is not None
                sequence.cache.tokens += drawn[at]

    def _read_drafts(self, step: Step) -> Events:
        """What a step has given, with what was right of the drafts; the next drafts."""
        drawn, said = self._steps.read(step)
        self._hear(said)
        rows = [(at, row) for at, row in enumerate(step.rows) if row.is_alive]
        asking = [(at, row) for at, row in rows if row.last]
        for _, row in rows:
            yield from _progress(row)
        if not asking:
            return
        note = [] if self._steps.has_head else self._follow(asking)
        told: list[int] = []
        for at, row in asking:
            sequence = row.sequence
            if self._steps.has_head:
                kept = sequence.accept(drawn[at])
            else:
                count, *note = note
                kept, note = note[:count], note[count:]
            sequence.settle_draft(kept)
            yield from self._take(step, row, kept)
            if self._steps.has_head:
                sequence.draft = sequence.next_draft()
            else:
                count, *note = note
                sequence.draft = (0,) * count
            told += [len(kept), *kept, len(sequence.draft)]
            if (reason := sequence.reason) is not None:
                yield self._finish(sequence, reason)
        if self._steps.has_head and self._steps.pipeline is not None:
            self._steps.pipeline.lead(told, self._note_size(asking))

    def _follow(self, asking: list[tuple[int, Row]]) -> list[int]:
        """What the leader of a pipeline has kept of each row, and drafted behind it."""
        assert self._steps.pipeline is not None
        return self._steps.pipeline.follow(self._note_size(asking))

    def _note_size(self, asking: list[tuple[int, Row]]) -> int:
        return len(asking) * (3 + self._speculate)

    def _take(self, step: Step, row: Row, tokens: list[int]) -> Events:
        drawn = step.drawn
        logprobs = [None if drawn is None else drawn.logprobs_at(row.first + at) for at in range(len(tokens))]
        for token in row.sequence.take(tokens, logprobs):
            yield row.sequence.number, token

    def _finish(self, sequence: Sequence, reason: FinishReason) -> tuple[int, Event | EngineError]:
        self.remove(sequence)
        return sequence.number, sequence.chooser.failure or sequence.finished(reason, mx.get_peak_memory())


def _progress(row: Row) -> Events:
    """How far the prompt is, if the row was a part of it."""
    sequence = row.sequence
    if row.source is None and not sequence.generated:
        yield sequence.number, Prefilled(row.position + row.last - 1, len(sequence.request.prompt))
