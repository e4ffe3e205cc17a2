"""How often each routed expert is used, to decide which ones stay in memory. Does not import MLX.

The score of an expert estimates the chance that the next token chooses it: its decayed frequency, plus the chance of a
repetition if a recent token chose it. An expert with a higher score evicts one with a lower score.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from kimi_mlx.errors import WeightsError

HALF_LIFE = 2000.0
"""Number of tokens after which a use counts half."""

RECENT_HALF_LIFE = 2.0
"""Number of tokens after which the chance of a repetition has halved."""

PRIOR_TOKENS = 50.0
"""Number of tokens with equal use of all experts that are assumed at the start."""

REPEAT_CHANCE, REPEAT_WEIGHT = 0.3, 0.002
"""Chance of a repetition at the start, and the weight of each observation of it."""

FEW_TOKENS = 16
"""Steps of more tokens are prompts, and do not count for repetitions."""

VERSION = 1


class ExpertUse:
    """Use of the routed experts of a rank.

    Args:
        layers: numbers of the layers with routed experts.
        num_experts: number of routed experts of each of these layers on this rank.
        experts_per_token: number of routed experts that a token chooses, on all ranks.
    """

    def __init__(self, layers: Sequence[int], num_experts: Sequence[int], experts_per_token: int):
        self.layers, self.num_experts = tuple(layers), tuple(num_experts)
        self._decay, self._recent_decay = 0.5 ** (1 / HALF_LIFE), 0.5 ** (1 / RECENT_HALF_LIFE)
        self._counts = [
            np.full(count, min(experts_per_token / count, 1.0) * PRIOR_TOKENS) for count in self.num_experts
        ]
        self._weights = [PRIOR_TOKENS] * len(self.layers)
        self._recent = [np.zeros(count) for count in self.num_experts]
        self.repeat_chance = REPEAT_CHANCE
        self.has_changed = False
        """Whether `observe` was called."""

    def observe(self, index: int, experts: np.ndarray, counts: np.ndarray, num_tokens: int) -> None:
        """Count the experts of a step.

        Args:
            index: index of the layer in `layers`.
            experts: used experts, without duplicates.
            counts: number of tokens that chose each of them.
            num_tokens: number of tokens of the step.
        """
        self.has_changed = True
        decay = self._decay**num_tokens
        used = self._counts[index]
        used *= decay
        used[experts] += counts
        self._weights[index] = self._weights[index] * decay + num_tokens
        recent = self._recent[index]
        if num_tokens > FEW_TOKENS:
            recent[:] = 0
            return
        self._learn_repeats(index, recent, experts)
        recent *= self._recent_decay
        recent[experts] = 1

    def _learn_repeats(self, index: int, recent: np.ndarray, experts: np.ndarray) -> None:
        """Update the chance of a repetition from the experts of the last step and of this one."""
        last = recent == 1
        num_last = int(last.sum())
        if not num_last:
            return
        by_chance = float(self._counts[index][last].sum()) / self._weights[index]
        share = (float(last[experts].sum()) - by_chance) / num_last
        self.repeat_chance += REPEAT_WEIGHT * (min(max(share, 0.0), 1.0) - self.repeat_chance)

    def scores(self, index: int) -> np.ndarray:
        """Return the score of each expert of a layer."""
        return self._counts[index] / self._weights[index] + self.repeat_chance * self._recent[index]

    def rates(self) -> list[np.ndarray]:
        """Return the uses per token of each expert of each layer."""
        return [counts / weight for counts, weight in zip(self._counts, self._weights, strict=True)]

    def to_bytes(self) -> bytes:
        """Return the statistics as the contents of an .npz file."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            version=np.array(VERSION),
            layers=np.array(self.layers),
            num_experts=np.array(self.num_experts),
            counts=np.concatenate(self._counts),
            weights=np.array(self._weights),
            repeat_chance=np.array(self.repeat_chance),
        )
        return file.getvalue()

    def update_from_bytes(self, data: bytes) -> None:
        """Load statistics that `to_bytes` returned.

        Raises:
            WeightsError: the data is damaged, or is of another model or share. Nothing is changed.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                version, repeat_chance = int(file["version"]), float(file["repeat_chance"])
                layers, num_experts = file["layers"].tolist(), file["num_experts"].tolist()
                counts, weights = file["counts"].astype(np.float64), file["weights"].astype(np.float64)
        except Exception as error:  # damaged files raise errors of many kinds, such as zlib.error and RuntimeError
            raise WeightsError(f"the statistics of expert use cannot be read: {error}") from error
        if (version, layers, num_experts) != (VERSION, list(self.layers), list(self.num_experts)):
            raise WeightsError("the statistics of expert use are of another model or share")
        is_whole = counts.shape == (sum(num_experts),) and weights.shape == (len(layers),)
        are_finite = np.isfinite(counts).all() and np.isfinite(weights).all()
        if not (is_whole and are_finite and (counts >= 0).all() and (weights > 0).all()):
            raise WeightsError("the statistics of expert use are damaged")
        self._counts = [part.copy() for part in np.split(counts, np.cumsum(num_experts)[:-1])]
        self._weights = weights.tolist()
        self.repeat_chance = min(max(repeat_chance, 0.0), 1.0)
