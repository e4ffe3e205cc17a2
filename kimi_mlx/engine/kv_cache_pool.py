"""A pool of KV caches, in which new prompts reuse the longest cached prefix.

The tokens of a sequence are those of its prompt and of its answer. The key of an image (ImageInput.key) replaces its
placeholder tokens, so two prompts share nothing from their first different image on.

Running sequences that begin with the same tokens share the rows of these (kimi_mlx.engine.shared_prefix).

All decisions depend only on tokens and on the order of calls, not on time or on free memory. Ranks make the same calls
and therefore always agree on the length of the cached prefix.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace

import mlx.core as mx

from kimi_mlx.engine.drafts.draft_cache import DraftCache
from kimi_mlx.engine.prompt_cache.block_file import BLOCK_TOKENS, Block, BlockShape
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.engine.prompt_cache.usage import CacheUsage
from kimi_mlx.engine.shared_prefix import SharedPrefix, length_to_share
from kimi_mlx.errors import CacheError
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model
from kimi_mlx.sizing.kv_cache import kv_values_per_token

END_TOKENS = 16
"""A cached sequence is continued in place if its last END_TOKENS reappear in the prompt, or if its unmatched tail is
not longer than that."""

COMPARED_TOKENS = 1024
"""Number of tokens that are compared at a time: 100k equal tokens take 4 ms."""


def padded_length(tokens: int) -> int:
    """Return the number of tokens that a cache of `tokens` allocates: buffers grow by LatentCache.step."""
    return -(-tokens // LatentCache.step) * LatentCache.step


def shape_of(model: Model) -> BlockShape:
    """Return the shape of a token's rows in the caches of a model, or of a rank's share."""
    config = model.config
    width = kv_values_per_token(config)
    return BlockShape(len(model.layers), width, model.layers[0]["input_layernorm"].dtype)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    size = min(len(a), len(b))
    for start in range(0, size, COMPARED_TOKENS):
        stop = min(start + COMPARED_TOKENS, size)
        if a[start:stop] != b[start:stop]:
            return bisect.bisect_left(
                range(stop), True, lo=start, key=lambda at: a[start : at + 1] != b[start : at + 1]
            )
    return size


def is_prefix(a: list[int], b: list[int]) -> bool:
    """Return whether `b` begins with all of `a`."""
    return len(a) <= len(b) and (not a or a[-1] == b[len(a) - 1]) and a == b[: len(a)]


class SequenceCache:
    """The KV cache of one sequence, with its tokens.

    `tokens` is updated when a step is built, the layers when it is computed; `sync` brings both to the same length.

    Args:
        model: model of the cache.
        draft: the draft model's cache, on the leader if there is a draft model. Nothing depends on its contents.
    """

    def __init__(self, model: Model, draft: DraftCache | None = None):
        self.layers: list[LatentCache] = model.make_cache()
        self.tokens: list[int] = []
        self.draft = draft
        self._prefix: SharedPrefix | None = None

    @property
    def prefix(self) -> SharedPrefix | None:
        """Prefix whose rows are shared with other caches, if any."""
        return self._prefix if self.layers[0].shared is not None else None

    @property
    def num_shared(self) -> int:
        """Number of tokens whose rows are shared with other caches."""
        return self.layers[0].num_shared

    def padded_length(self, tokens: int) -> int:
        """Return the number of tokens that this cache allocates for `tokens` tokens, without its shared prefix."""
        return padded_length(tokens - self.num_shared)

    def sync(self) -> None:
        """Trim layers and `tokens` to their common length."""
        for layer in self.layers:
            layer.trim(layer.offset - len(self.tokens))
        length = min(layer.offset for layer in self.layers)
        del self.tokens[length:]
        if self.draft is not None:
            self.draft.truncate(length)

    def truncate(self, length: int) -> None:
        """Keep only the first `length` tokens."""
        del self.tokens[length:]
        self.sync()

    def copy(self, other: SequenceCache, length: int, prefix: SharedPrefix | None = None) -> None:
        """Replace the contents with the first `length` tokens of another cache; at least one.

        Args:
            other: the other cache.
            length: number of tokens.
            prefix: the first of these tokens, whose rows are shared instead of copied.
        """
        for at, (layer, other_layer) in enumerate(zip(self.layers, other.layers, strict=True)):
            layer.copy(other_layer, length, None if prefix is None else prefix.layers[at])
        self._prefix = prefix
        self.tokens = other.tokens[:length]
        if self.draft is not None and other.draft is not None:
            self.draft.copy(other.draft, length)

    def share(self, prefix: SharedPrefix | None) -> None:
        """Use the rows of a prefix, with which this cache begins, instead of its own; None for its own rows only."""
        for at, layer in enumerate(self.layers):
            layer.copy(layer, layer.offset, None if prefix is None else prefix.layers[at])
        self._prefix = prefix

    def resize(self, tokens: int) -> None:
        """Allocate memory for `tokens` tokens, at least the current ones; share only the prefix with other caches."""
        for layer in self.layers:
            rows, used = padded_length(tokens - layer.num_shared), layer.num_own
            if layer.keys is not None and (layer.stack is not None or layer.keys.shape[2] != rows):
                keys = layer.keys[:, :, :used]
                shape = (*keys.shape[:2], rows - used, keys.shape[3])
                layer.keys = mx.concatenate([keys, mx.zeros(shape, keys.dtype)], axis=2)
        mx.async_eval([layer.state for layer in self.layers])

    def append(self, tokens: Sequence[int], rows: mx.array, capacity: int) -> None:
        """Append tokens with known rows.

        Args:
            tokens: L integers.
            rows: (layers, L, width).
            capacity: number of tokens to allocate if there is no buffer yet.
        """
        for layer, layer_rows in zip(self.layers, rows, strict=True):
            if layer.keys is None:
                layer.keys = mx.zeros((1, 1, padded_length(capacity), rows.shape[2]), rows.dtype)
            layer.append(layer_rows[None, None])
        # One block at a time, so that there is no second copy of all blocks.
        mx.eval([layer.state for layer in self.layers])
        self.tokens.extend(tokens)

    def rows(self, start: int, stop: int) -> mx.array:
        """Return the rows of some tokens, (layers, stop - start, width), not evaluated."""
        return mx.stack([layer.rows_between(start, stop)[0, 0] for layer in self.layers if layer.keys is not None])


class KVCachePool:
    """The caches of one model: those in use, and idle ones up to a budget, evicted least recently used first.

    A cache in use counts with all of its prompt from the start. A prefix that caches share counts once.

    Args:
        model: model of the caches.
        budget_tokens: number of tokens of all caches, as counted by `padded_length`; None for one full context.
        blocks: the prompt cache on disk, if any.
        has_draft_caches: whether each sequence also has a cache of the draft model.
    """

    def __init__(
        self,
        model: Model,
        budget_tokens: int | None = None,
        blocks: BlockStore | None = None,
        has_draft_caches: bool = False,
    ):
        self._model, self._has_draft_caches = model, has_draft_caches
        self._blocks = blocks
        self.budget_tokens = (
            padded_length(model.config.max_position_embeddings) if budget_tokens is None else budget_tokens
        )
        self._idle: list[SequenceCache] = []
        """Least recently used first."""
        self._busy: list[tuple[SequenceCache, int]] = []
        """Pairs of a cache and the length of its prompt."""
        self._num_prefixes = 0
        self._lookups = CacheUsage()

    @property
    def usage(self) -> CacheUsage:
        """Use of the caches and of the blocks on disk so far. Safe from any thread."""
        blocks = self._blocks
        if blocks is None:
            return self._lookups
        return replace(
            self._lookups,
            disk_blocks=len(blocks),
            disk_bytes=blocks.size_bytes,
            disk_limit_bytes=blocks.limit_bytes,
        )

    @property
    def idle_tokens(self) -> int:
        """Number of tokens of the budget that only idle caches use."""
        own = sum(cache.padded_length(len(cache.tokens)) for cache in self._idle)
        return own + sum(map(len, _prefixes(self._idle) - self._busy_prefixes))

    @property
    def busy_tokens(self) -> int:
        """Number of tokens of the budget that caches in use take."""
        own = sum(cache.padded_length(max(len(cache.tokens), prompt)) for cache, prompt in self._busy)
        return own + sum(map(len, self._busy_prefixes))

    @property
    def _busy_prefixes(self) -> set[SharedPrefix]:
        return _prefixes(cache for cache, _ in self._busy)

    def has_room(self, prompt: Sequence[int], new_tokens: int = 0, max_cached: int | None = None) -> bool:
        """Return whether a sequence fits in addition to those in use; `acquire` makes the room.

        Args:
            prompt: its known tokens.
            new_tokens: number of further tokens.
            max_cached: maximum number of tokens that it takes from caches; None for all but the last.
        """
        free, total = self.budget_tokens - self.busy_tokens, len(prompt) + new_tokens
        if padded_length(total) <= free:
            return True
        return self._needed_tokens(total, _longest_prefix(self._busy_prefixes, list(prompt[:-1][:max_cached]))) <= free

    def make_room(self, tokens: int) -> bool:
        """Evict idle caches until those in use can grow by `tokens`. If they cannot, return False and evict none.

        Args:
            tokens: number of tokens, as counted by `padded_length`.
        """
        if self.busy_tokens + tokens > self.budget_tokens:
            return False
        while self.busy_tokens + self.idle_tokens + tokens > self.budget_tokens:
            del self._idle[0]
        return True

    def acquire(self, prompt: Sequence[int], max_cached: int | None = None) -> tuple[SequenceCache, int]:
        """Return a cache for a prompt, and the number of tokens it already holds: at most all but the last.

        These are the longest common prefix with any cached sequence and with the blocks on disk. An idle cache that
        the prompt continues is used in place. From any other cache the prefix is copied, so that it stays intact.

        Args:
            prompt: its known tokens.
            max_cached: maximum number of tokens to take from caches; None for all but the last.

        Raises:
            RingError: a block on disk that all ranks rely on cannot be used.
        """
        reusable = list(prompt[:-1][:max_cached])
        source, common = self._longest(reusable)
        cache = source if source in self._idle and _is_continued_in(source.tokens, reusable, common) else None
        if cache is not None:
            self._idle.remove(cache)
        prefix = self._prefix_to_share(reusable, common)
        needed = self._needed_tokens(len(prompt), prefix)
        while self._idle and self.busy_tokens + self.idle_tokens + needed > self.budget_tokens:
            if self._idle.pop(0) is source:
                cache = source  # no room for both
        if cache is None:
            cache = SequenceCache(self._model, DraftCache() if self._has_draft_caches else None)
            if source is not None:
                cache.copy(source, common, prefix)
        cache.truncate(common)
        if cache.prefix is not prefix:
            cache.share(prefix)
        cache.resize(len(prompt))
        self._load(cache, reusable, len(prompt))
        lookup = CacheUsage(len(prompt), common, len(cache.tokens) - common)
        self._lookups = self._lookups.with_earlier(lookup)
        self._busy.append((cache, len(prompt)))
        return cache, len(cache.tokens)

    def _prefix_to_share(self, tokens: list[int], common: int) -> SharedPrefix | None:
        """Return the prefix whose rows a new sequence shares.

        Either running sequences share it already, or a running sequence starts to share some of its own rows. A
        sequence that runs alone keeps its own rows, because attention in two parts takes longer.

        Args:
            tokens: tokens of the new sequence.
            common: length of its longest common prefix with any cache.
        """
        existing = _longest_prefix(self._busy_prefixes, tokens)
        length = length_to_share(common, len(existing or ()))
        partner = next(
            (
                (cache, prompt)
                for cache, prompt in self._busy
                if 0 < length >= cache.num_shared and is_prefix(tokens[:length], cache.tokens)
            ),
            None,
        )
        if partner is None:
            return existing
        cache, prompt = partner
        prefix = _longest_prefix(_prefixes(self._idle), tokens[:length])
        if prefix is None or 2 * len(prefix) < length or not length_to_share(len(prefix), len(existing or ())):
            self._num_prefixes += 1
            prefix = SharedPrefix.of(self._num_prefixes, tokens[:length], cache.layers)
        cache.share(prefix)
        cache.resize(max(len(cache.tokens), prompt))
        return prefix

    def _needed_tokens(self, tokens: int, prefix: SharedPrefix | None) -> int:
        """Return the number of tokens of the budget that one more sequence of `tokens` tokens takes.

        Args:
            tokens: number of its tokens.
            prefix: prefix that it shares with running sequences, if any.
        """
        return padded_length(tokens - len(prefix or ()))

    def release(self, cache: SequenceCache) -> None:
        """Return a synced cache to the pool."""
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
        layer = cache.layers[0]
        if layer.stack is not None or layer.state[0].shape[2] > cache.padded_length(len(cache.tokens)):
            cache.resize(len(cache.tokens))
        while self._idle and self.busy_tokens + self.idle_tokens > self.budget_tokens:
            del self._idle[0]

    def clear(self) -> None:
        """Drop idle caches and free their memory; blocks on disk stay."""
        self._idle.clear()

    def discard_all(self) -> None:
        """Discard all caches, also those in use: after a failed step their contents are unknown."""
        self._busy.clear()
        self._idle.clear()

    def _longest(self, tokens: list[int]) -> tuple[SequenceCache | None, int]:
        """Return the cache with the longest common prefix, and its length. Ties go to the latest used idle cache."""
        longest, common = None, 0
        for cache in [*reversed(self._idle), *(busy for busy, _ in self._busy)]:
            if common == len(tokens):
                break
            if cache.tokens[common : common + 1] == tokens[common : common + 1]:  # otherwise its prefix is not longer
                length = common_prefix(cache.tokens, tokens)
                if length > common:
                    longest, common = cache, length
        return longest, common

    def _load(self, cache: SequenceCache, tokens: list[int], capacity: int) -> None:
        """Append blocks from disk that continue the cached prefix."""
        blocks: list[Block] = [] if self._blocks is None else self._blocks.find(tokens)
        first = len(cache.tokens) // BLOCK_TOKENS
        for index, block in enumerate(blocks[first:], first):
            assert self._blocks is not None
            start = index * BLOCK_TOKENS
            block_tokens = tokens[start : start + BLOCK_TOKENS]
            shared = max(cache.num_shared - start, 0)
            try:
                rows = self._blocks.read(block, block_tokens)
            except CacheError:  # later blocks cannot be used without it
                return
            cache.truncate(start + shared)
            cache.append(block_tokens[shared:], rows[:, shared:], capacity)


def _prefixes(caches: Iterable[SequenceCache]) -> set[SharedPrefix]:
    """Return the prefixes that caches share with others."""
    return {cache.prefix for cache in caches if cache.prefix is not None}


def _longest_prefix(prefixes: Iterable[SharedPrefix], tokens: list[int]) -> SharedPrefix | None:
    """Return the longest of some prefixes with which a sequence begins, if any."""
    matching = [prefix for prefix in prefixes if is_prefix(prefix.tokens, tokens)]
    return max(matching, key=lambda prefix: (len(prefix), prefix.number), default=None)


def _is_continued_in(tokens: list[int], prompt: list[int], common: int) -> bool:
    """Return whether a prompt continues a cached sequence, so that the rest of that sequence is not needed any more.

    Either the unmatched tail is short, or its end reappears later in the prompt: templates strip reasoning.
    """
    if len(tokens) - common <= END_TOKENS:
        return True
    end, rest = array("q", tokens[-END_TOKENS:]).tobytes(), array("q", prompt[common:]).tobytes()
    at = rest.find(end)
    while at > 0 and at % array("q").itemsize:
        at = rest.find(end, at + 1)
    return at >= 0
