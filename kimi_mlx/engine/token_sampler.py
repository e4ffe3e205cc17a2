"""How the tokens of one sequence are chosen: its sampling, its bias, what its grammar allows."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from kimi_mlx.engine.constraint import Constraint, masked
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sampling import GREEDY_BELOW, make_sampler, seeded
from kimi_mlx.errors import EngineError


class TokenSampler:
    """Chooses the tokens of one sequence.

    A grammar that fails in the middle ends the answer by a token, as any answer ends, so that ranks without a grammar
    do the same; `failure` tells then.

    Args:
        request: what is asked.
        vocab_size: of the model.
        seed: of its random numbers.
        constraint: of its grammar, if it has one.
    """

    def __init__(self, request: Request, vocab_size: int, seed: int | None, constraint: Constraint | None):
        sampling = request.sampling
        self._bias, self._stop_ids = request.logit_bias, sorted(request.stop_ids)
        self._constraint = constraint
        self.sample = seeded(make_sampler(sampling, vocab_size), seed)
        self.is_greedy = sampling.temperature < GREEDY_BELOW and not request.logit_bias and constraint is None
        """Whether it takes the likeliest token, nothing else."""
        self.failure: EngineError | None = None
        """Why the grammar was given up."""
        if request.answered:
            self.advance(request.prompt[-request.answered :])

    def bias(self, logits: mx.array, draft: Sequence[int]) -> mx.array:
        """Logits with the bias added, and -inf where the grammar allows nothing.

        Args:
            logits: (n, vocab_size), behind the sequence and behind each token of the draft.
            draft: n - 1 tokens that may follow.
        """
        if self._bias:
            ids, values = zip(*self._bias, strict=True)
            logits = logits.at[:, mx.array(ids)].add(mx.array(values, logits.dtype))
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

    def advance(self, tokens: Sequence[int]) -> None:
        """Tokens were drawn."""
        if self._constraint is None or self.failure is not None:
            return
        try:
            for token in tokens:
                self._constraint.advance(token)
        except EngineError as error:
            self.failure = error
