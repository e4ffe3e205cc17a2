"""Known models: what they are called, where they come from, what they need.

The facts are data, in `catalogue.json`; each one has its source there, and those that nobody has verified say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from kimi_mlx.sizing import hosts as sizing


@dataclass(frozen=True)
class SamplingValues:
    """Recommended sampling; None where nothing is recommended."""

    temperature: float | None
    top_p: float | None
    min_p: float | None

    def recommended(self) -> dict[str, float]:
        """The values that are recommended, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Licence:
    """The licence of the weights.

    Args:
        name: as its file calls it.
        url: of its text.
        display: the name that large products must show; None if they need not.
    """

    name: str
    url: str
    display: str | None


@dataclass(frozen=True)
class CatalogueEntry:
    """A model that has a short name; None where it has no such thing, or we refuse the model.

    Args:
        alias: the short name.
        title: the full one.
        repository: what to fetch from the hub; None if the model comes with the package.
        original_repository: of its makers; the same where no suitable MLX repository is known.
        format: of the weights, in words.
        size_bytes: of the download.
        weights_bytes: in memory: more than the download for INT4, whose biases are made here.
        kv_bytes_per_token: of the cache in bfloat16, on every host.
        context_tokens: at most.
        sampling: recommended.
        instant_sampling: recommended without thinking, for models that can be told not to think.
        licence: of the weights.
        about: one line.
        refused: why kimi-mlx does not run it; None if it does.
        source: where each fact is from, by its name.
    """

    alias: str
    title: str
    repository: str | None
    original_repository: str | None
    format: str
    size_bytes: int | None
    weights_bytes: int | None
    kv_bytes_per_token: int | None
    context_tokens: int
    sampling: SamplingValues | None
    instant_sampling: SamplingValues | None
    licence: Licence
    about: str
    refused: str | None
    source: Mapping[str, str]

    @property
    def is_packaged(self) -> bool:
        """Whether it comes with kimi-mlx."""
        return self.repository is None and self.refused is None

    def default_sampling(self) -> dict[str, float]:
        """Recommended values by name, for what the checkpoint itself leaves open."""
        return self.sampling.recommended() if self.sampling else {}

    def minimum_memory_bytes(self, hosts: int = 1) -> int | None:
        """Return the memory of all hosts together: weights + 10 %, and on each host an 8k-token cache and 8 GB.

        None for the packaged model, which runs anywhere, and for refused ones.
        """
        if self.weights_bytes is None or self.kv_bytes_per_token is None:
            return None
        return sizing.minimum_memory_bytes(self.weights_bytes, self.kv_bytes_per_token, hosts)

    def hosts_needed(self, memory_bytes: int, gpu_bytes: int) -> int | None:
        """Return the number of equal hosts that hold the model; None if above MAX_HOSTS or the model is refused.

        Args:
            memory_bytes: memory of each host.
            gpu_bytes: part of it that the GPU can use.
        """
        if self.is_packaged:
            return 1
        if self.weights_bytes is None or self.kv_bytes_per_token is None:
            return None
        return sizing.hosts_needed(self.weights_bytes, self.kv_bytes_per_token, memory_bytes, gpu_bytes)

    def packaged_folder(self) -> Path | None:
        """Where it lies inside the package, None if it does not come with it."""
        return Path(str(resources.files("kimi_mlx"))) / "models" / self.alias if self.is_packaged else None


@cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """All known models, the oldest first of each size; refused ones at the end."""
    text = resources.files("kimi_mlx.hub").joinpath("catalogue.json").read_text(encoding="utf-8")
    return tuple(parse_entry(raw) for raw in json.loads(text)["models"])


def parse_entry(raw: Mapping[str, Any]) -> CatalogueEntry:
    """An entry of `catalogue.json`; TypeError for a field that is missing or unknown."""
    nested = {
        name: SamplingValues(**raw[name]) for name in ("sampling", "instant_sampling") if raw.get(name) is not None
    }
    return CatalogueEntry(**{**raw, **nested, "licence": Licence(**raw.get("licence", {}))})


def find_entry(name: str) -> CatalogueEntry | None:
    """The entry of an alias or of a repository, be it the one we fetch or its makers'; case does not matter."""
    wanted = name.lower()
    for entry in catalogue():
        names = (entry.alias, entry.repository, entry.original_repository)
        if any(known is not None and known.lower() == wanted for known in names):
            return entry
    return None
