"""Default sampling and default length of answers: `generation_config.json`, else the caller's values, else our own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_mlx.engine.request import Sampling
from kimi_mlx.errors import TextError, UsageError
from kimi_mlx.model.config import read_json

GENERATION_CONFIG = "generation_config.json"

DEFAULT_TEMPERATURE = 0.6
"""Temperature if neither `generation_config.json` nor the catalogue sets one: the value on K2's model cards."""

MAX_TOKENS_KEY = "kimi_mlx_max_tokens"
"""Key of `generation_config.json` with the default limit of an answer. Only the bundled models have it, because a toy
may repeat itself endlessly. The key is our own, so that it limits no real model."""

FILE_NAMES = ("temperature", "top_p", "top_k", "min_p")
"""Sampling parameters that `generation_config.json` may set."""


@dataclass(frozen=True)
class GenerationConfig:
    """Defaults of the answers of one checkpoint.

    Args:
        sampling: recommended sampling.
        max_tokens: default limit of an answer; None is the rest of the context.
        from_file: names of the values that `generation_config.json` sets.
    """

    sampling: Sampling
    max_tokens: int | None = None
    from_file: frozenset[str] = frozenset()

    @classmethod
    def load(cls, folder: Path, defaults: Mapping[str, float] | None = None) -> GenerationConfig:
        """Read the defaults of a checkpoint.

        Args:
            folder: folder of the checkpoint.
            defaults: sampling parameters by name, for those that `generation_config.json` does not set.

        Raises:
            TextError: `generation_config.json` is broken.
        """
        path = folder / GENERATION_CONFIG
        generation = read_json(path) if path.exists() else {}
        max_tokens = _max_tokens(path, generation)
        limit = frozenset[str]() if max_tokens is None else frozenset({"max_tokens"})
        if generation.get("do_sample") is False:
            return cls(Sampling(temperature=0.0), max_tokens, limit | set(FILE_NAMES))
        values = {name: generation[name] for name in FILE_NAMES if generation.get(name) is not None}
        try:
            sampling = Sampling(**{"temperature": DEFAULT_TEMPERATURE, **(defaults or {}), **values})
        except UsageError as error:
            raise TextError(f"`{path}`: {error.message}", hint="correct the file, or download it again") from error
        return cls(sampling, max_tokens, limit | values.keys())


def _max_tokens(path: Path, generation: Mapping[str, Any]) -> int | None:
    value = generation.get(MAX_TOKENS_KEY)
    if value is None or (isinstance(value, int) and value > 0):
        return value
    raise TextError(f"`{path}`: `{MAX_TOKENS_KEY}` is {value!r}, not a whole number above 0", hint="correct the file")
