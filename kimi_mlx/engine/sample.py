"""Sample the tokens of a step from its logits, with their log probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.batch_entry import BatchEntry
from kimi_mlx.engine.events import Logprobs
from kimi_mlx.engine.request import Sampling
from kimi_mlx.engine.sampling import sample_rows


@dataclass
class SampledTokens:
    """Tokens sampled from a step.

    Args:
        tokens: (M,) integers, one for each row of the logits.
        logprobs: by row: log probability (1,), ids and log probabilities of the most likely tokens (k,).
    """

    tokens: mx.array
    logprobs: dict[int, tuple[mx.array, mx.array, mx.array]]

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate."""
        return [self.tokens, *(array for arrays in self.logprobs.values() for array in arrays)]

    def read(self, entries: Sequence[BatchEntry]) -> dict[int, list[int]]:
        """Wait for the tokens; return them by index of their entry."""
        tokens = cast("list[int]", self.tokens.tolist())
        return {index: tokens[entry.logits_rows] for index, entry in enumerate(entries) if entry.num_logits}

    def logprobs_at(self, row: int) -> Logprobs | None:
        """Return the log probabilities of the token of a row, if its request has top_logprobs."""
        if row not in self.logprobs:
            return None
        token, ids, values = (array.tolist() for array in self.logprobs[row])
        pairs = sorted(zip(cast("list[int]", ids), cast("list[float]", values), strict=True), key=lambda pair: -pair[1])
        return Logprobs(cast("list[float]", token)[0], tuple(pairs))


def sample_tokens(logits: mx.array, entries: Sequence[BatchEntry]) -> SampledTokens:
    """Sample all tokens of a step.

    Args:
        logits: (M, vocab_size).
        entries: entries of the step.
    """
    with_logits = [entry for entry in entries if entry.num_logits]
    if all(entry.sequence.sampler.is_greedy for entry in with_logits):
        tokens = mx.argmax(logits, axis=-1)
    else:
        tokens = _sample_together(logits, with_logits)
    logprobs = {
        row: _logprobs(logits[row : row + 1], tokens[row : row + 1], top_logprobs)
        for entry in with_logits
        if (top_logprobs := entry.sequence.request.top_logprobs) is not None
        for row in _rows(entry)
    }
    return SampledTokens(tokens, logprobs)


def _sample_together(logits: mx.array, entries: Sequence[BatchEntry]) -> mx.array:
    """Sample the tokens of all entries, (M,); those with equal sampling parameters at once."""
    groups: dict[Sampling, list[BatchEntry]] = {}
    for entry in entries:
        groups.setdefault(replace(entry.sequence.request.sampling, seed=None), []).append(entry)
    sampled: list[mx.array] = []
    for sampling, group in groups.items():
        rows = [entry.sequence.sampler.bias(logits[entry.logits_rows], entry.draft) for entry in group]
        seeds = [
            seed
            for entry in group
            for seed in entry.sequence.sampler.sample.row_seeds(entry.position, entry.num_logits)
        ]
        sampled.append(sample_rows(rows[0] if len(rows) == 1 else mx.concatenate(rows), sampling, seeds))
    tokens = sampled[0] if len(sampled) == 1 else mx.concatenate(sampled)
    order = [row for group in groups.values() for entry in group for row in _rows(entry)]
    if order == sorted(order):
        return tokens
    return tokens[mx.array(sorted(range(len(order)), key=order.__getitem__))]


def _rows(entry: BatchEntry) -> range:
    """Return the rows of the logits of an entry."""
    return range(entry.logits_start, entry.logits_start + entry.num_logits)


def _logprobs(logits: mx.array, token: mx.array, top_logprobs: int) -> tuple[mx.array, mx.array, mx.array]:
    """Return the log probability of a token, and ids and log probabilities of the most likely tokens.

    Args:
        logits: (1, vocab_size).
        token: (1,).
        top_logprobs: number of most likely tokens.
    """
    logits = logits.astype(mx.float32)
    logprobs = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
    ids = mx.argpartition(-logprobs, kth=max(top_logprobs - 1, 0))[:top_logprobs]
    return logprobs[token], ids, logprobs[ids]
