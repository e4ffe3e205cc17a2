"""Draft models as the planner sees them: memory, bytes per draft token, and published acceptance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

from kimi_mlx.hub.catalogue import DraftEntry
from kimi_mlx.model.draft_config import DraftConfig, parse_draft_config
from kimi_mlx.sizing.draft import DraftMemory, draft_memory, draft_pass_bytes, draft_weight_bytes

PUBLISHED_DRAFTED = 3
"""Drafted tokens per step in the published measurements of acceptance."""

ASSUMED_TOKENS_PER_STEP = 2.65
"""Tokens per step of a draft model without a published number: the mean of K2.7 Code's four workloads (coding 2.82,
question answering 2.57, role play 2.26, retrieval 2.95), https://huggingface.co/lightseekorg."""


@dataclass(frozen=True)
class DraftShape:
    """A draft model.

    Args:
        name: name for the user.
        config: its dimensions.
        tokens_per_step: mean number of tokens per step with PUBLISHED_DRAFTED drafted ones, including the model's own.
        source: source of that number.
        has_embedding: whether its files have an embedding of their own.
    """

    name: str
    config: DraftConfig
    tokens_per_step: float
    source: str
    has_embedding: bool = False

    @property
    def most_drafted(self) -> int:
        """Largest number of draft tokens per step for which acceptance is known."""
        return PUBLISHED_DRAFTED

    @cached_property
    def memory(self) -> DraftMemory:
        """Memory on the host of rank 0."""
        return draft_memory(self.config, self.has_embedding)

    @cached_property
    def _pass_bytes(self) -> int:
        return draft_pass_bytes(self.config)

    @cached_property
    def _fc_bytes(self) -> int:
        return draft_weight_bytes(self.config) - self._pass_bytes

    def read_bytes(self, drafted: int, context: int) -> int:
        """Return the bytes that the draft model reads for `drafted` tokens: `fc` once, other weights and cache each."""
        return self._fc_bytes + drafted * (self._pass_bytes + context * self.memory.token_bytes)

    def tokens_of(self, drafted: int) -> float:
        """Return the mean number of tokens per step with fewer draft tokens, each accepted with equal probability."""
        probability = acceptance_of(self.tokens_per_step, PUBLISHED_DRAFTED)
        return sum(probability**count for count in range(drafted + 1))


def acceptance_of(tokens_per_step: float, drafted: int) -> float:
    """Return the probability p that a draft token is accepted: 1 + p + ... + p**drafted is the tokens per step."""
    low, high = 0.0, 1.0
    for _ in range(50):  # halves the interval
        middle = (low + high) / 2
        is_below = sum(middle**count for count in range(drafted + 1)) < tokens_per_step
        low, high = (middle, high) if is_below else (low, middle)
    return low


def published_draft_config() -> DraftConfig:
    """Return the dimensions of the draft models that are published for K2.5 to K2.7."""
    text = resources.files("kimi_mlx.planner").joinpath("models.json").read_text(encoding="utf-8")
    return parse_draft_config(json.loads(text)["drafts"], where="models.json")


def make_draft_shape(
    name: str, config: DraftConfig, entry: DraftEntry | None, has_embedding: bool = False
) -> DraftShape:
    """Return a draft model with the acceptance that the catalogue has, else the assumed one.

    Args:
        name: name for the user.
        config: dimensions of the draft model.
        entry: entry in the catalogue; None for other draft models.
        has_embedding: whether its files have an embedding of their own.
    """
    if entry is None or entry.tokens_per_step is None:
        source = f"assumed: the mean of four workloads of K2.7 Code's, {PUBLISHED_DRAFTED} drafted"
        return DraftShape(name, config, ASSUMED_TOKENS_PER_STEP, source, has_embedding)
    return DraftShape(name, config, entry.tokens_per_step, entry.source["tokens_per_step"], has_embedding)
