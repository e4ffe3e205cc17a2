"""How the tokens of one sequence are chosen: its sampling, its bias, what its grammar allows."""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sampling import GREEDY_BELOW, make_sampler, seeded


class Constraint(Protocol):
    """What a grammar allows next in one sequence; see kimi_mlx.engine.constraint."""

    def apply(self, logits: mx.array, draft: tuple[int, ...]) -> mx.array:
        """Logits with -inf where nothing is allowed.

        Args:
            logits: (n, vocab_size), behind the sequence and behind each token of the draft.
            draft: n - 1 tokens that may follow.
        """
        ...

    def advance(self, token: int) -> None:
        """A token was drawn."""
        ...


class Chooser:
    """Chooses the tokens of one sequence.

    Args:
        request: what is asked.
        vocab_size: of the model.
        seed: of its random numbers.
        constraint: of its grammar, if it has one.
    """

    def __init__(self, request: Request, vocab_size: int, seed: int | None, constraint: Constraint | None):
        sampling = request.sampling
        self._bias = request.logit_bias
        self._constraint = constraint
        self.draw = seeded(make_sampler(sampling, vocab_size), seed)
        self.is_plain = sampling.temperature < GREEDY_BELOW and not request.logit_bias and constraint is None
        """Whether it takes the likeliest token, nothing else."""

    def bias(self, logits: mx.array, draft: tuple[int, ...]) -> mx.array:
        """Logits (n, vocab_size) with the bias added, and -inf where the grammar allows nothing."""
        if self._bias:
            ids, values = zip(*self._bias, strict=True)
            logits = logits.at[:, mx.array(ids)].add(mx.array(values, logits.dtype))
        return logits if self._constraint is None else self._constraint.apply(logits, draft)

    def advance(self, token: int) -> None:
        """A token was drawn."""
        if self._constraint is not None:
            self._constraint.advance(token)
