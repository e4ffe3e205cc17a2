"""Caches of conversations: which tokens they hold, and how much of a new prompt they spare."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.decoder import Model


class ConversationCache:
    """The KV cache of one conversation, with the tokens that are in it.

    The tokens are noted when they are fed; if a generation is broken off, `settle` brings tokens and cache together.
    """

    def __init__(self, model: Model):
        self._model = model
        self.layers: list[LatentCache] = model.make_cache()
        self.tokens: list[int] = []

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest common prefix with `prompt`, all but its last token at most; returns its length."""
        self.settle()
        common = self.common(prompt)
        del self.tokens[common:]
        self.settle()
        return common

    def common(self, prompt: Sequence[int]) -> int:
        """Length of the longest common prefix, all but the prompt's last token at most."""
        pairs = zip(self.tokens, prompt[:-1], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def copy(self, other: ConversationCache, length: int) -> None:
        """Hold the first tokens of another cache, instead of what was held."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.copy(theirs, length)
        self.tokens = other.tokens[:length]

    def settle(self) -> None:
        """Forget what was fed to the layers and is not noted."""
        for layer in self.layers:
            layer.trim(layer.offset - len(self.tokens))
        fed = min(layer.offset for layer in self.layers)
        del self.tokens[fed:]


class CacheShelf:
    """The caches of one model: those in use, and as many idle ones as there were conversations at a time."""

    def __init__(self, model: Model):
        self._model = model
        self._idle: list[ConversationCache] = []
        self._busy: list[ConversationCache] = []

    def take(self, prompt: Sequence[int]) -> tuple[ConversationCache, int]:
        """A cache for a prompt, and how much of it is in it already.

        An idle one goes on where it was; what only a busy one has is copied.
        """
        cache = max(self._idle, key=lambda idle: idle.common(prompt), default=None)
        if cache is None:
            cache = ConversationCache(self._model)
        else:
            self._idle.remove(cache)
        source = max(self._busy, key=lambda busy: busy.common(prompt), default=cache)
        if source.common(prompt) > cache.common(prompt):
            cache.copy(source, source.common(prompt))
        self._busy.append(cache)
        return cache, cache.reuse(prompt)

    def give_back(self, cache: ConversationCache) -> None:
        """Keep a cache for later."""
        self._busy.remove(cache)
        self._idle.append(cache)

    def clear(self) -> None:
        """Forget what is idle, and free the memory."""
        self._idle.clear()
