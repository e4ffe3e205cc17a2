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

    def settle(self) -> None:
        """Forget what was fed to the layers and is not noted."""
        for layer in self.layers:
            layer.trim(layer.offset - len(self.tokens))
        fed = min(layer.offset for layer in self.layers)
        del self.tokens[fed:]


class CacheShelf:
    """The caches that are not in use: as many as there were conversations at a time."""

    def __init__(self, model: Model):
        self._model = model
        self._idle: list[ConversationCache] = []

    def take(self, prompt: Sequence[int]) -> tuple[ConversationCache, int]:
        """A cache for a prompt, and how much of it is in it already."""
        if self._idle:
            best = max(self._idle, key=lambda cache: cache.common(prompt))
            self._idle.remove(best)
        else:
            best = ConversationCache(self._model)
        return best, best.reuse(prompt)

    def give_back(self, cache: ConversationCache) -> None:
        """Keep a cache for later."""
        self._idle.append(cache)

    def clear(self) -> None:
        """Forget all, and free the memory."""
        self._idle.clear()
