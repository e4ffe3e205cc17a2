"""Sample the tokens of one sequence with its sampling parameters, its changes to logits and its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.constraint import Constraint
from kimi_mlx.engine.logits_processor import LogitsProcessor, change_logits
from kimi_mlx.engine.request import Request
from kimi_mlx.engine.sampling import GREEDY_BELOW, Sampler
from kimi_mlx.engine.token_mask import Mask, masked, set_tokens
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
        self._stop_ids = sorted(request.stop_ids)
        self._min_tokens, self._num_answered = request.min_tokens, 0
        self._constraint = constraint
        self.sample = Sampler(sampling, seed)
        self.processor = LogitsProcessor.of(request, has_min_tokens=constraint is None)
        """Changes to the logits; None if there are none."""
        self._is_greedy = sampling.temperature < GREEDY_BELOW and self.processor is None
        self.failure: EngineError | None = None
        """Error of the grammar, if it failed."""
        if request.answered:
            self.advance(request.prompt[-request.answered :])

    @property
    def is_ready(self) -> bool:
        """Whether a token can be sampled without waiting for the grammar to be compiled."""
        return self._constraint is None or self._constraint.is_compiled

    @property
    def was_shortened(self) -> bool:
        """Whether the grammar has closed the answer early because of its maximum number of tokens."""
        return self._constraint is not None and self._constraint.was_shortened

    def is_greedy(self, draft: Sequence[int] = ()) -> bool:
        """Return whether the token with the largest logit is sampled, without changes to the logits and without a mask.

        Args:
            draft: draft tokens; the result holds after the sequence and after each of them.
        """
        return self._is_greedy and self._is_free(draft)

    def mask(self, logits: mx.array, draft: Sequence[int]) -> mx.array:
        """Return logits with -inf for the tokens that the grammar forbids.

        Args:
            logits: (n, vocab_size), after the sequence and after each token of the draft.
            draft: n - 1 draft tokens.
        """
        if self._constraint is None or self._is_free(draft):
            return logits
        if self.failure is None:
            try:
                return masked(logits, mx.array(self._masks(self._constraint, draft)))
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
            draft: the draft so far, (1,) each. It is read, which waits, only if penalties, a minimum length or a mask
                depend on it.

        Returns:
            (1,), the token; None if the grammar fails or has failed.
        """
        is_masked = self._constraint is not None and not self._is_free()
        needs_draft = is_masked or (self.processor is not None and self.processor.depends_on_answer)
        ids = [cast(int, token.item()) for token in draft] if needs_draft else []
        if self.processor is not None:
            logits = change_logits(logits, [(0, self.processor.changes(ids)[-1])])
        if self._constraint is not None and is_masked:
            try:
                masks = self._masks(self._constraint, ids)
            except EngineError:  # all ranks meet the error when they verify the draft so far
                return None
            logits = masked(logits, mx.array(masks[-1:]))
        return mx.argmax(logits, axis=-1) if self._is_greedy else self.sample(logits, length + len(draft))

    def allowed_prefix(self, draft: Sequence[int]) -> tuple[int, ...]:
        """Return the draft tokens up to the first one that the grammar forbids."""
        if self._constraint is None or self.failure is not None or not draft:
            return tuple(draft)
        try:
            return tuple(draft[: self._constraint.num_allowed(draft)])
        except EngineError:  # all ranks meet the error when they verify the draft
            return tuple(draft)

    def advance(self, tokens: Sequence[int]) -> None:
        """Append sampled tokens."""
        self._num_answered += len(tokens)
        if self.processor is not None:
            self.processor.advance(tokens)
        if self._constraint is None or self.failure is not None:
            return
        try:
            for token in tokens:
                self._constraint.advance(token)
        except EngineError as error:
            self.failure = error

    def _is_free(self, draft: Sequence[int] = ()) -> bool:
        """Return whether no mask forbids a token, after the sequence and after each token of a draft."""
        if self._constraint is None:
            return True
        is_long_enough = self._num_answered >= self._min_tokens
        return self.failure is None and is_long_enough and self._constraint.is_free(draft)

    def _masks(self, constraint: Constraint, draft: Sequence[int]) -> Mask:
        """Return the grammar's masks, without stop tokens before the minimum length if other tokens are allowed.

        Raises:
            EngineError: the grammar fails.
        """
        masks = constraint.allowed_for_draft(draft)
        for row in range(min(len(masks), self._min_tokens - self._num_answered)):
            longer = masks[row].copy()
            set_tokens(longer, self._stop_ids, False)
            if longer.any():
                masks[row] = longer
        return masks
