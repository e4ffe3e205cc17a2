"""Tokens drawn from the logits of a step, and their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.batch_entry import Row
from kimi_mlx.engine.request import Logprobs


@dataclass
class Drawn:
    """The tokens drawn from a step, and what else was asked for.

    Args:
        tokens: (M,) integers, for each row of the step as many as it asks for.
        logprobs: by position in `tokens`: log probability (1,), ids and log probabilities of the likeliest (k,).
    """

    tokens: mx.array
    logprobs: dict[int, tuple[mx.array, mx.array, mx.array]]

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated."""
        return [self.tokens, *(array for found in self.logprobs.values() for array in found)]

    def read(self, rows: Sequence[Row]) -> dict[int, list[int]]:
        """The tokens of each row that asks for some; waits for them."""
        tokens = cast("list[int]", self.tokens.tolist())
        return {at: tokens[row.first : row.first + row.last] for at, row in enumerate(rows) if row.last}

    def logprobs_at(self, position: int) -> Logprobs | None:
        """Of the token at a position in `tokens`, if they were asked for."""
        if position not in self.logprobs:
            return None
        token, ids, values = (array.tolist() for array in self.logprobs[position])
        pairs = sorted(zip(cast("list[int]", ids), cast("list[float]", values), strict=True), key=lambda pair: -pair[1])
        return Logprobs(cast("list[float]", token)[0], tuple(pairs))


def draw_rows(logits: mx.array, rows: Sequence[Row]) -> Drawn:
    """Draw all tokens of a step.

    Args:
        logits: (M, vocab_size).
        rows: of the step.
    """
    asking = [row for row in rows if row.last]
    if all(row.sequence.chooser.is_plain for row in asking):
        tokens = mx.argmax(logits, axis=-1)
    else:
        tokens = mx.concatenate([_draw(logits, row) for row in asking])
    logprobs = {
        at: _logprobs(logits[at : at + 1], tokens[at : at + 1], wanted)
        for row in asking
        if (wanted := row.sequence.request.top_logprobs) is not None
        for at in range(row.first, row.first + row.last)
    }
    return Drawn(tokens, logprobs)


def _draw(logits: mx.array, row: Row) -> mx.array:
    """The tokens of one row, (last,)."""
    chooser = row.sequence.chooser
    mine = logits[row.first : row.first + row.last]
    if chooser.is_plain:
        return mx.argmax(mine, axis=-1)
    mine = chooser.bias(mine, row.draft)
    drawn = [chooser.draw(mine[at : at + 1], row.position + at) for at in range(row.last)]
    return drawn[0] if len(drawn) == 1 else mx.concatenate(drawn)


def _logprobs(logits: mx.array, token: mx.array, wanted: int) -> tuple[mx.array, mx.array, mx.array]:
    """Log probability of a token, and ids and log probabilities of the likeliest ones.

    Args:
        logits: (1, vocab_size).
        token: (1,).
        wanted: how many of the likeliest.
    """
    logits = logits.astype(mx.float32)
    found = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
    ids = mx.argpartition(-found, kth=max(wanted - 1, 0))[:wanted]
    return found[token], ids, found[ids]
