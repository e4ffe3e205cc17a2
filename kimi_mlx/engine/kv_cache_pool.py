"""Caches of conversations: which tokens they hold, and how much of a new prompt they spare.

Every decision is made from tokens and from the order of the calls, never from a clock or from free memory: so the ranks
of a ring, which are given the same calls, always agree on how much of a prompt is there.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence

import mlx.core as mx

from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS, Block, BlockShape
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.errors import CacheError
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model
from kimi_mlx.sizing.kv_cache import kv_values_per_token

END_TOKENS = 16
"""A conversation whose last so many tokens are said again in a prompt goes on there; a tail no longer than this is not
worth a copy."""

COMPARED_TOKENS = 1024
"""At a time: 100 k equal tokens take 4 ms."""


def padded_length(tokens: int) -> int:
    """How many tokens' memory a sequence of `tokens` takes: buffers grow by LatentCache.step."""
    return -(-tokens // LatentCache.step) * LatentCache.step


def shape_of(model: Model) -> BlockShape:
    """What a token takes in the caches of a model, or of a rank's share."""
    config = model.config
    width = kv_values_per_token(config)
    return BlockShape(len(model.layers), width, model.layers[0]["input_layernorm"].dtype)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    size = min(len(a), len(b))
    for start in range(0, size, COMPARED_TOKENS):
        stop = min(start + COMPARED_TOKENS, size)
        if a[start:stop] != b[start:stop]:
            return bisect.bisect_left(
                range(stop), True, lo=start, key=lambda at: a[start : at + 1] != b[start : at + 1]
            )
    return size


def is_prefix(a: list[int], b: list[int]) -> bool:
    """Whether a sequence begins with all of `a`."""
    return len(a) <= len(b) and (not a or a[-1] == b[len(a) - 1]) and a == b[: len(a)]


class SequenceCache:
    """The KV cache of one conversation, with the tokens that are in it.

    The tokens are noted when they are fed; if a generation is broken off, `sync` brings tokens and cache together.
    """

    def __init__(self, model: Model):
        self.layers: list[LatentCache] = model.make_cache()
        self.tokens: list[int] = []

    def sync(self) -> None:
        """Forget what was fed to the layers and is not noted."""
        for layer in self.layers:
            layer.trim(layer.offset - len(self.tokens))
        fed = min(layer.offset for layer in self.layers)
        del self.tokens[fed:]

    def truncate(self, length: int) -> None:
        """Hold the first tokens alone."""
        del self.tokens[length:]
        self.sync()

    def copy(self, other: SequenceCache, length: int) -> None:
        """Hold the first tokens of another cache, at least one, instead of what was held."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.copy(theirs, length)
        self.tokens = other.tokens[:length]

    def resize(self, tokens: int) -> None:
        """Take the memory of so many tokens, not less than are held, and share none with another cache."""
        rows = padded_length(tokens)
        for layer in self.layers:
            if layer.keys is not None and layer.keys.shape[2] != rows:
                kept = layer.keys[:, :, : layer.offset]
                shape = (*kept.shape[:2], rows - layer.offset, kept.shape[3])
                layer.keys = mx.concatenate([kept, mx.zeros(shape, kept.dtype)], axis=2)
        mx.async_eval([layer.state for layer in self.layers])

    def append(self, tokens: Sequence[int], rows: mx.array, room: int) -> None:
        """Hold further tokens whose rows are known.

        Args:
            tokens: L integers.
            rows: (layers, L, width).
            room: tokens for which memory is taken, if there is none yet.
        """
        for layer, layer_rows in zip(self.layers, rows, strict=True):
            if layer.keys is None:
                layer.keys = mx.zeros((1, 1, padded_length(room), rows.shape[2]), rows.dtype)
            layer.append(layer_rows[None, None])
        mx.eval([layer.state for layer in self.layers])  # a block at a time: no second copy of all of them
        self.tokens.extend(tokens)

    def rows(self, start: int, stop: int) -> mx.array:
        """The rows of some tokens, (layers, stop - start, width), not yet computed."""
        return mx.stack([layer.keys[0, 0, start:stop] for layer in self.layers if layer.keys is not None])


class KVCachePool:
    """The caches of one model: those in use, and idle ones as far as the budget reaches, used last first.

    A sequence that is in use counts with all of its prompt from the start.

    Args:
        model: whose caches they are.
        budget_tokens: for all of them, in units of `padded_length`; None: as many as the context holds.
        blocks: what is kept on disk, too.
    """

    def __init__(self, model: Model, budget_tokens: int | None = None, blocks: BlockStore | None = None):
        self._model = model
        self._blocks = blocks
        self.budget_tokens = (
            padded_length(model.config.max_position_embeddings) if budget_tokens is None else budget_tokens
        )
        self._idle: list[SequenceCache] = []
        """Those first that were used longest ago."""
        self._busy: list[tuple[SequenceCache, int]] = []
        """With the lengths of their prompts."""

    @property
    def idle_tokens(self) -> int:
        """What idle sequences take of the budget."""
        return sum(padded_length(len(cache.tokens)) for cache in self._idle)

    @property
    def busy_tokens(self) -> int:
        """What sequences in use take of the budget."""
        return sum(padded_length(max(len(cache.tokens), prompt)) for cache, prompt in self._busy)

    def has_room(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens fits beside those in use; `acquire` makes the room."""
        return self.busy_tokens + padded_length(tokens) <= self.budget_tokens

    def make_room(self, tokens: int) -> bool:
        """Give up idle ones until sequences in use may take so many more; False if they cannot, and all stay.

        Args:
            tokens: in units of `padded_length`.
        """
        if self.busy_tokens + tokens > self.budget_tokens:
            return False
        while self.busy_tokens + self.idle_tokens + tokens > self.budget_tokens:
            del self._idle[0]
        return True

    def acquire(self, prompt: Sequence[int]) -> tuple[SequenceCache, int]:
        """A cache for a prompt, and how much of it is in it already: all but the last token at most.

        The longest common prefix with any sequence, and with what is on disk. An idle one that goes on in this prompt
        is continued; of others the prefix is copied, so that their own continuations find them as they were.

        Raises:
            RingError: a block on disk, of which all ranks have agreed that it is there, cannot be used.
        """
        wanted = list(prompt[:-1])
        source, common = self._longest(wanted)
        cache = source if source in self._idle and _is_continued_in(source.tokens, wanted, common) else None
        if cache is not None:
            self._idle.remove(cache)
        while self._idle and self.busy_tokens + self.idle_tokens + padded_length(len(prompt)) > self.budget_tokens:
            if self._idle.pop(0) is source:
                cache = source  # no room for both
        if cache is None:
            cache = SequenceCache(self._model)
            if source is not None:
                cache.copy(source, common)
        cache.truncate(common)
        cache.resize(len(prompt))
        self._load(cache, wanted, len(prompt))
        self._busy.append((cache, len(prompt)))
        return cache, len(cache.tokens)

    def release(self, cache: SequenceCache) -> None:
        """Keep a cache for later; it is settled."""
        self._busy = [(busy, prompt) for busy, prompt in self._busy if busy is not cache]
        if not cache.tokens:
            return
        if self._blocks is not None:
            self._blocks.put(cache.tokens, cache.rows)
        longer = next((idle for idle in self._idle if is_prefix(cache.tokens, idle.tokens)), None)
        if longer is not None:
            self._idle.remove(longer)
            cache = longer
        self._idle = [idle for idle in self._idle if not is_prefix(idle.tokens, cache.tokens)]
        self._idle.append(cache)
        if cache.layers[0].state[0].shape[2] > padded_length(len(cache.tokens)):
            cache.resize(len(cache.tokens))
        while self._idle and self.busy_tokens + self.idle_tokens > self.budget_tokens:
            del self._idle[0]

    def clear(self) -> None:
        """Forget what is idle, and free the memory; what is on disk stays."""
        self._idle.clear()

    def abandon(self) -> None:
        """Forget what is in use, too: a step has failed, and nobody knows what is in it."""
        self._busy.clear()
        self._idle.clear()

    def _longest(self, wanted: list[int]) -> tuple[SequenceCache | None, int]:
        """The sequence that has most of the tokens, and how many; of equal ones the idle one that was used last."""
        longest, common = None, 0
        for cache in [*reversed(self._idle), *(busy for busy, _ in self._busy)]:
            if common == len(wanted):
                break
            if cache.tokens[common : common + 1] == wanted[common : common + 1]:  # else it cannot have more
                found = common_prefix(cache.tokens, wanted)
                if found > common:
                    longest, common = cache, found
        return longest, common

    def _load(self, cache: SequenceCache, wanted: list[int], room: int) -> None:
        """Read from disk what it has more of."""
        found: list[Block] = [] if self._blocks is None else self._blocks.find(wanted)
        first = len(cache.tokens) // BLOCK_TOKENS
        for index, block in enumerate(found[first:], first):
            assert self._blocks is not None
            start = index * BLOCK_TOKENS
            tokens = wanted[start : start + BLOCK_TOKENS]
            try:
                rows = self._blocks.read(block, tokens)
            except CacheError:  # it is forgotten; what lies behind it is no use
                return
            cache.truncate(start)
            cache.append(tokens, rows, room)


def _is_continued_in(tokens: list[int], wanted: list[int], common: int) -> bool:
    """Whether a conversation goes on in a prompt, so that nobody will ask for its tail behind the common tokens again.

    Either there is hardly a tail, or its end is said again further on: templates strip the thinking in between.
    """
    if len(tokens) - common <= END_TOKENS:
        return True
    end, rest = array("I", tokens[-END_TOKENS:]).tobytes(), array("I", wanted[common:]).tobytes()
    at = rest.find(end)
    while at > 0 and at % array("I").itemsize:
        at = rest.find(end, at + 1)
    return at >= 0
