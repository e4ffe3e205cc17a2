"""Changes to the logits of some tokens of a sequence: logit bias, minimum length and penalties.

Order and formulas are those of vLLM: first the bias, and -inf for stop tokens of an answer that is too short; then
repetition penalty, frequency penalty and presence penalty. Log probabilities are those before all these changes.

Sources: Sampler.forward in vLLM's vllm/v1/sample/sampler.py, apply_penalties in vllm/model_executor/layers/utils.py;
the repetition penalty is from Keskar et al. 2019 (https://arxiv.org/abs/1909.05858).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from kimi_mlx.engine.request import Request, Sampling

MIN_CAPACITY = 16
"""Minimum number of tokens for which memory is allocated."""

NEUTRAL = (0.0, 1.0, 0.0)
"""Values of LogitChanges that change nothing."""


@dataclass(frozen=True)
class LogitChanges:
    """Changes to one row of logits.

    Args:
        ids: (K,) int32, different tokens.
        values: (3, K) float32: bias, repetition penalty, and sum of frequency and presence penalties.
    """

    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]


class LogitsProcessor:
    """The changes to the logits of one sequence, from its request and the tokens of its answer.

    Only tokens with a change take memory and time. All ranks that sample compute the same changes.

    Args:
        request: request of the sequence. Pass the tokens that it has `answered` to `advance`.
        has_min_tokens: whether this enforces the minimum length; False if the grammar's mask does.
    """

    def __init__(self, request: Request, *, has_min_tokens: bool = True):
        sampling = request.sampling
        self._frequency, self._presence = sampling.frequency_penalty, sampling.presence_penalty
        self._repetition = sampling.repetition_penalty
        self._has_penalties = _has_penalties(sampling)
        self._min_tokens = request.min_tokens if has_min_tokens else 0
        self._num_answered = 0
        prompt = request.prompt[: len(request.prompt) - request.answered] if self._repetition != 1 else ()
        self._ids = np.unique(np.array(prompt, np.int32))
        self._num_prompt_slots = self._ids.size  # tokens of the prompt come first
        self._slots = dict(zip(self._ids.tolist(), range(self._ids.size), strict=True))
        self._values = np.repeat(np.array([NEUTRAL], np.float32).T, self._ids.size, axis=1)
        self._values[1] = self._repetition
        self._counts: dict[int, int] = {}
        for token, bias in request.logit_bias:
            slot = self._slot(token)
            self._values[0, slot] += bias
        self._stop_slots = [self._slot(token) for token in sorted(request.stop_ids)] if self._min_tokens else []

    @classmethod
    def of(cls, request: Request, *, has_min_tokens: bool = True) -> LogitsProcessor | None:
        """Return the processor of a request; None if it changes no logits."""
        has_minimum = has_min_tokens and request.min_tokens > 0
        if not (request.logit_bias or has_minimum or _has_penalties(request.sampling)):
            return None
        return cls(request, has_min_tokens=has_min_tokens)

    @property
    def depends_on_answer(self) -> bool:
        """Whether the changes depend on the tokens of the answer."""
        return bool(self._min_tokens) or self._has_penalties

    def advance(self, tokens: Iterable[int]) -> None:
        """Append tokens to the answer."""
        for token in tokens:
            self._count(token, 1)
            self._num_answered += 1

    def changes(self, draft: Sequence[int] = ()) -> list[LogitChanges]:
        """Return the changes after the answer and after each token of a draft, len(draft) + 1."""
        changes = [self._changes(0)]
        for number, token in enumerate(draft, 1):
            self._count(token, 1)
            changes.append(self._changes(number))
        for token in draft:
            self._count(token, -1)
        return changes

    def _changes(self, num_drafted: int) -> LogitChanges:
        count = len(self._slots)
        values = self._values[:, :count].copy()
        if self._num_answered + num_drafted < self._min_tokens:
            values[0, self._stop_slots] = -np.inf
        return LogitChanges(self._ids[:count], values)

    def _count(self, token: int, change: int) -> None:
        """Change the number of times that the answer has a token."""
        if not self._has_penalties:
            return
        slot = self._slot(token)
        count = self._counts[token] = self._counts.get(token, 0) + change
        self._values[1, slot] = self._repetition if count or slot < self._num_prompt_slots else 1
        self._values[2, slot] = self._frequency * count + self._presence * (count > 0)

    def _slot(self, token: int) -> int:
        """Return the index of a token in the arrays; append it if it is new."""
        slot = self._slots.get(token)
        if slot is None:
            slot = self._slots[token] = len(self._slots)
            if slot == self._ids.size:  # earlier changes keep the old arrays
                self._ids = np.resize(self._ids, max(2 * slot, MIN_CAPACITY))
                self._values = np.pad(self._values, [(0, 0), (0, self._ids.size - slot)])
            self._ids[slot], self._values[:, slot] = token, NEUTRAL
        return slot


def _has_penalties(sampling: Sampling) -> bool:
    return (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) != (0, 0, 1)


def change_logits(logits: mx.array, changes: Sequence[tuple[int, LogitChanges]]) -> mx.array:
    """Return changed logits, (M, vocab_size) float32, with one gather and one scatter for all rows.

    Args:
        logits: (M, vocab_size).
        changes: pairs of a row and its changes. Without any changed token the logits are returned unchanged.
    """
    rows = np.concatenate([np.full(change.ids.size, row, np.int32) for row, change in changes])
    if not rows.size:
        return logits
    at = mx.array(rows), mx.array(np.concatenate([change.ids for _, change in changes]))
    bias, repetition, subtracted = mx.array(np.concatenate([change.values for _, change in changes], axis=1))
    changed = logits.astype(mx.float32)
    values = changed[at] + bias
    changed[at] = mx.where(values > 0, values / repetition, values * repetition) - subtracted
    return changed
