"""Sample the tokens of one sequence with its sampling parameters, logit bias and grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.constraint import Constraint, masked
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sampling import GREEDY_BELOW, Sampler
from kimi_mlx.errors import EngineError


class TokenSampler:
    """Samples the tokens of one sequence.

    If the grammar fails, only stop tokens are allowed, so that the answer also ends on ranks without the grammar.
    `failure` then holds the error.

    Args:
        request: request of the sequence.
        seed: seed of the random numbers.
        constraint: constraint of the grammar, if any.
    """

    def __init__(self, request: Request, seed: int, constraint: Constraint | None):
        sampling = request.sampling
        self._bias, self._stop_ids = request.logit_bias, sorted(request.stop_ids)
        self._constraint = constraint
        self.sample = Sampler(sampling, seed)
        self.is_greedy = sampling.temperature < GREEDY_BELOW and not request.logit_bias and constraint is None
        """Whether the most likely token is taken, without bias or grammar."""
        self.failure: EngineError | None = None
        """Error of the grammar, if it failed."""
        if request.answered:
            self.advance(request.prompt[-request.answered :])

    @property
    def is_ready(self) -> bool:
        """Whether a token can be sampled without waiting for the grammar to be compiled."""
        return self._constraint is None or self._constraint.is_compiled

    def bias(self, logits: mx.array, draft: Sequence[int]) -> mx.array:
        """Add the bias to logits, and -inf to tokens that the grammar forbids.

        Args:
            logits: (n, vocab_size), after the sequence and after each token of the draft.
            draft: n - 1 draft tokens.
        """
        if self._bias:
            logits = self._add_bias(logits)
        if self._constraint is None:
            return logits
        if self.failure is None:
            try:
                return masked(logits, mx.array(self._constraint.allowed_for_draft(draft)))
            except EngineError as error:
                self.failure = error
        ends = mx.full(logits.shape, -mx.inf, logits.dtype)
        ends[:, mx.array(self._stop_ids)] = 0
        return ends

    def sample_draft(self, logits: mx.array, length: int, draft: Sequence[mx.array]) -> mx.array | None:
        """Sample the next draft token, with the random numbers of the model's token at its position.

        Args:
            logits: (1, vocab_size), of the draft model.
            length: number of known tokens.
            draft: the draft so far, (1,) each. A grammar waits for it.

        Returns:
            (1,), the token; None if the grammar fails or has failed.
        """
        if self._bias:
            logits = self._add_bias(logits)
        if self._constraint is not None:
            try:
                masks = self._constraint.allowed_for_draft([cast(int, token.item()) for token in draft])
            except EngineError:  # all ranks meet the error when they verify the draft so far
                return None
            logits = masked(logits, mx.array(masks[-1:]))
        return mx.argmax(logits, axis=-1) if self.is_greedy else self.sample(logits, length + len(draft))

    def allowed_prefix(self, draft: Sequence[int]) -> tuple[int, ...]:
        """Return the draft tokens up to the first one that the grammar forbids."""
        if self._constraint is None or self.failure is not None or not draft:
            return tuple(draft)
        try:
            return tuple(draft[: self._constraint.num_allowed(draft)])
        except EngineError:  # all ranks meet the error when they verify the draft
            return tuple(draft)

    def advance(self, tokens: Sequence[int]) -> None:
        """Advance the grammar by sampled tokens."""
        if self._constraint is None or self.failure is not None:
            return
        try:
            for token in tokens:
                self._constraint.advance(token)
        except EngineError as error:
            self.failure = error

    def _add_bias(self, logits: mx.array) -> mx.array:
        ids, values = zip(*self._bias, strict=True)
        return logits.at[:, mx.array(ids)].add(mx.array(values, logits.dtype))
