"""Plain LRU as the policy of the streamer: an expert that is read replaces the least recently used one."""

from __future__ import annotations

import numpy as np

from kimi_mlx.model.expert_use import ExpertUse

MOST_RECENT = 2.0
"""Above all scores, so that a guessed expert gets a slot at once, like a needed one."""


class LeastRecentlyUsed(ExpertUse):
    """Use of experts that only knows when each one was used last; before its first use, what was learned earlier."""

    def __init__(self, use: ExpertUse, experts_per_token: int):
        super().__init__(use.layers, use.num_experts, experts_per_token)
        self._learned = [0.5 * use.scores(index) / use.scores(index).max() for index in range(len(use.layers))]
        self._used_at = [np.zeros(count) for count in use.num_experts]
        self._clock = 0
        self.repeat_chance = MOST_RECENT

    def observe(self, index: int, experts: np.ndarray, counts: np.ndarray, num_tokens: int) -> None:
        """Note the use of experts."""
        self._clock += 1
        self._used_at[index][experts] = self._clock

    def scores(self, index: int) -> np.ndarray:
        """Return a number for each expert of a layer: below 0.5 before its first use, then higher for later uses."""
        used_at = self._used_at[index]
        return np.where(used_at > 0, 0.5 + used_at / (2 * self._clock + 2), self._learned[index])
