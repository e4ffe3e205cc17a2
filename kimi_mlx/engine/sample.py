"""Sample the tokens of a step from its logits, with their log probabilities and those of tokens of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.batch_entry import BatchEntry
from kimi_mlx.engine.events import Logprobs
from kimi_mlx.engine.logits_processor import change_logits
from kimi_mlx.engine.request import Sampling
from kimi_mlx.engine.sampling import sample_rows

TOP_BLOCK = 256
"""Number of logits per block in the search for the largest ones."""


@dataclass(frozen=True)
class LogprobArrays:
    """Log probabilities of N tokens, not evaluated.

    Args:
        tokens: (N,) float32, of the tokens themselves.
        top_ids: (N, K) most likely tokens, most likely first.
        top: (N, K) float32, of the most likely tokens.
    """

    tokens: mx.array
    top_ids: mx.array
    top: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate."""
        return [self.tokens, self.top_ids, self.top]

    def read(self) -> list[Logprobs]:
        """Wait for the log probabilities of all tokens."""
        tokens = cast("list[float]", self.tokens.tolist())
        ids, values = cast("list[list[int]]", self.top_ids.tolist()), cast("list[list[float]]", self.top.tolist())
        tops = (tuple(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True))
        return [Logprobs(token, top) for token, top in zip(tokens, tops, strict=True)]


@dataclass
class SampledTokens:
    """Tokens sampled from a step.

    Args:
        tokens: (M,) integers, one for each row of the logits.
        logprobs: log probabilities of the tokens in the rows `logprob_rows`; None if there are none.
        logprob_rows: rows of tokens with log probabilities.
        prompt_logprobs: log probabilities of tokens of prompts, in the order of the entries.
    """

    tokens: mx.array
    logprobs: LogprobArrays | None = None
    logprob_rows: Sequence[int] = ()
    prompt_logprobs: list[LogprobArrays] = field(default_factory=list[LogprobArrays])

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate."""
        arrays = [self.tokens, *(array for part in self.prompt_logprobs for array in part.arrays)]
        return arrays if self.logprobs is None else arrays + self.logprobs.arrays

    def read(self, entries: Sequence[BatchEntry]) -> dict[int, list[int]]:
        """Wait for the tokens; return them by index of their entry."""
        tokens = cast("list[int]", self.tokens.tolist())
        return {index: tokens[entry.logits_rows] for index, entry in enumerate(entries) if entry.num_logits}

    def logprobs_at(self, row: int, top_logprobs: int | None) -> Logprobs | None:
        """Return the log probabilities of the token of a row; None if `top_logprobs` is None.

        Args:
            row: row of the token.
            top_logprobs: number of most likely tokens.
        """
        return None if top_logprobs is None else _cut(self._token_logprobs[row], top_logprobs)

    def prompt_logprobs_of(self, entries: Sequence[BatchEntry], index: int) -> tuple[Logprobs, ...]:
        """Return the log probabilities of tokens of a prompt that an entry has computed.

        Args:
            entries: entries of the step.
            index: index of the entry.
        """
        start = sum(entry.num_prompt_logits for entry in entries[:index])
        count = entries[index].sequence.request.prompt_logprobs or 0
        stop = start + entries[index].num_prompt_logits
        return tuple(_cut(logprobs, count) for logprobs in self._prompt_logprobs[start:stop])

    @cached_property
    def _token_logprobs(self) -> dict[int, Logprobs]:
        logprobs = [] if self.logprobs is None else self.logprobs.read()
        return dict(zip(self.logprob_rows, logprobs, strict=True))

    @cached_property
    def _prompt_logprobs(self) -> list[Logprobs]:
        return [logprobs for part in self.prompt_logprobs for logprobs in part.read()]


def _cut(logprobs: Logprobs, count: int) -> Logprobs:
    """Return log probabilities with `count` most likely tokens."""
    return logprobs if len(logprobs.top) == count else Logprobs(logprobs.token, logprobs.top[:count])


def sample_tokens(logits: mx.array, entries: Sequence[BatchEntry]) -> SampledTokens:
    """Sample all tokens of a step.

    Args:
        logits: (M, vocab_size).
        entries: entries of the step.
    """
    with_logits = [entry for entry in entries if entry.num_logits]
    if all(entry.sequence.sampler.is_greedy(entry.draft) for entry in with_logits):
        tokens = mx.argmax(logits, axis=-1)
    else:
        tokens = _sample_together(logits, with_logits)
    counts = {
        row: top_logprobs
        for entry in with_logits
        if (top_logprobs := entry.sequence.request.top_logprobs) is not None
        for row in _rows(entry)
    }
    if not counts:
        return SampledTokens(tokens)
    rows = list(counts)
    if len(rows) < logits.shape[0]:
        logits = logits[mx.array(rows)]
        return SampledTokens(tokens, logprobs_of(logits, tokens[mx.array(rows)], max(counts.values())), rows)
    return SampledTokens(tokens, logprobs_of(logits, tokens, max(counts.values())), rows)


def _sample_together(logits: mx.array, entries: Sequence[BatchEntry]) -> mx.array:
    """Sample the tokens of all entries, (M,); entries with equal sampling parameters are sampled at once."""
    changes = [
        (row, change)
        for entry in entries
        if entry.sequence.sampler.processor is not None
        for row, change in zip(_rows(entry), entry.sequence.sampler.processor.changes(entry.draft), strict=True)
    ]
    if changes:
        logits = change_logits(logits, changes)
    groups: dict[Sampling, list[BatchEntry]] = {}
    for entry in entries:
        groups.setdefault(_distribution(entry.sequence.request.sampling), []).append(entry)
    sampled: list[mx.array] = []
    for sampling, group in groups.items():
        rows = [entry.sequence.sampler.mask(logits[entry.logits_rows], entry.draft) for entry in group]
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


def _distribution(sampling: Sampling) -> Sampling:
    """Return the parameters that sample_rows uses."""
    return Sampling(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p)


def _rows(entry: BatchEntry) -> range:
    """Return the rows of the logits of an entry."""
    return range(entry.logits_start, entry.logits_start + entry.num_logits)


def logprobs_of(logits: mx.array, tokens: mx.array, top_logprobs: int) -> LogprobArrays:
    """Return log probabilities of tokens and of the most likely tokens.

    Args:
        logits: (N, vocab_size).
        tokens: (N,) integers.
        top_logprobs: number of most likely tokens.
    """
    logits = logits.astype(mx.float32)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    ids, top = _largest(logits, top_logprobs)
    return LogprobArrays((mx.take_along_axis(logits, tokens[:, None], axis=-1) - total)[:, 0], ids, top - total)


def _largest(logits: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Return ids and values of the largest logits, each (N, count), largest first.

    The `count` blocks with the largest maxima contain all of the `count` largest logits, so only these are sorted.

    Args:
        logits: (N, vocab_size).
        count: number of logits of each row.
    """
    if count < 2:
        ids = mx.argmax(logits, axis=-1, keepdims=True)[:, :count]
        return ids, mx.take_along_axis(logits, ids, axis=-1)
    num_rows, vocab_size = logits.shape
    padding = -vocab_size % TOP_BLOCK
    if padding:
        logits = mx.pad(logits, [(0, 0), (0, padding)], constant_values=-mx.inf)
    blocks = logits.reshape(num_rows, -1, TOP_BLOCK)
    best = mx.argsort(-blocks.max(axis=-1), axis=-1)[:, :count]
    values = blocks[mx.arange(num_rows)[:, None], best].reshape(num_rows, -1)
    order = mx.argsort(-values, axis=-1)[:, :count]
    ids = mx.take_along_axis(best, order // TOP_BLOCK, axis=-1) * TOP_BLOCK + order % TOP_BLOCK
    return ids, mx.take_along_axis(values, order, axis=-1)
