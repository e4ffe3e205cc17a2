"""Known models: aliases, repositories, sizes and other facts.

The facts are in `catalogue.json`, each with its source; facts without a confirmed source are marked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SamplingValues:
    """Recommended sampling parameters; None if there is no recommendation."""

    temperature: float | None
    top_p: float | None
    min_p: float | None

    def recommended(self) -> dict[str, float]:
        """Return the recommended values by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Licence:
    """Licence of the weights.

    Args:
        name: name of the licence in its file.
        url: address of its text.
        display: name that large products must display; None if there is no such term.
    """

    name: str
    url: str
    display: str | None


@dataclass(frozen=True)
class CatalogueEntry:
    """A known model. Fields that do not apply are None; a refused model has few fields.

    Args:
        alias: short name.
        title: full name.
        repository: repository to download; None if the model is bundled with the package.
        original_repository: the model authors' repository; equal to `repository` without a suitable MLX repository.
        earlier_repository: repository that the alias named in earlier versions; used if it is on this machine and
            `repository` is not.
        format: format of the weights, shown to the user.
        size_bytes: size of the download.
        weights_bytes: size in memory; larger than the download for INT4, because MLX needs biases.
        kv_bytes_per_token: bytes per token of the KV cache in bfloat16, on every host.
        context_tokens: largest context.
        sees_images: whether the weights in `repository` have a vision tower.
        sampling: recommended sampling.
        instant_sampling: recommended sampling without thinking, for models that can disable thinking.
        licence: licence of the weights.
        about: one-line description.
        refused: reason why kimi-mlx does not run the model; None if it does.
        source: source of each fact, by field name.
    """

    alias: str
    title: str
    repository: str | None
    original_repository: str | None
    earlier_repository: str | None
    format: str
    size_bytes: int | None
    weights_bytes: int | None
    kv_bytes_per_token: int | None
    context_tokens: int
    sees_images: bool
    sampling: SamplingValues | None
    instant_sampling: SamplingValues | None
    licence: Licence
    about: str
    refused: str | None
    source: Mapping[str, str]

    @property
    def is_packaged(self) -> bool:
        """Whether the model is bundled with kimi-mlx."""
        return self.repository is None and self.refused is None

    def default_sampling(self) -> dict[str, float]:
        """Return the recommended sampling parameters by name, as defaults for a checkpoint that sets none."""
        return self.sampling.recommended() if self.sampling else {}

    def packaged_folder(self) -> Path | None:
        """Return the folder inside the package; None if the model is not bundled."""
        return Path(str(resources.files("kimi_mlx"))) / "models" / self.alias if self.is_packaged else None


@dataclass(frozen=True)
class DraftEntry:
    """A known draft model.

    Args:
        alias: short name.
        title: full name.
        repository: repository to download; None if it is bundled with the package.
        model: alias of the model for which it drafts.
        licence: licence of the weights; None if it is not known.
        tokens_per_step: published mean number of tokens per step, with the model's own; None if it is not known.
        about: one-line description.
        source: source of each fact, by field name.
    """

    alias: str
    title: str
    repository: str | None
    model: str
    licence: Licence | None
    tokens_per_step: float | None
    about: str
    source: Mapping[str, str]

    def packaged_folder(self) -> Path | None:
        """Return the folder inside the package; None if the draft model is not bundled."""
        return Path(str(resources.files("kimi_mlx"))) / "models" / self.alias if self.repository is None else None


@cache
def catalogue() -> tuple[CatalogueEntry, ...]:
    """Return all known models, by size and then by age; refused ones last."""
    return tuple(parse_entry(raw) for raw in _read()["models"])


@cache
def drafts() -> tuple[DraftEntry, ...]:
    """Return all known draft models, in the order of their models."""
    return tuple(parse_draft(raw) for raw in _read()["drafts"])


def _read() -> dict[str, Any]:
    return json.loads(resources.files("kimi_mlx.hub").joinpath("catalogue.json").read_text(encoding="utf-8"))


def parse_draft(raw: Mapping[str, Any]) -> DraftEntry:
    """Parse an entry of the draft models. Raises TypeError for a missing or unknown field."""
    licence = None if raw.get("licence") is None else Licence(**raw["licence"])
    return DraftEntry(**{**raw, "licence": licence})


def parse_entry(raw: Mapping[str, Any]) -> CatalogueEntry:
    """Parse an entry of `catalogue.json`. Raises TypeError for a missing or unknown field."""
    nested = {
        name: SamplingValues(**raw[name]) for name in ("sampling", "instant_sampling") if raw.get(name) is not None
    }
    return CatalogueEntry(**{**raw, **nested, "licence": Licence(**raw.get("licence", {}))})


def find_entry(name: str) -> CatalogueEntry | None:
    """Return the entry with this alias or repository (a download's or the model authors'), ignoring case."""
    lower_name = name.lower()
    for entry in catalogue():
        names = (entry.alias, entry.repository, entry.original_repository, entry.earlier_repository)
        if any(known is not None and known.lower() == lower_name for known in names):
            return entry
    return None


def find_draft(name: str) -> DraftEntry | None:
    """Return the draft model with this alias or repository, ignoring case."""
    lower_name = name.lower()
    return next((entry for entry in drafts() if lower_name in (entry.alias, (entry.repository or "").lower())), None)


def draft_of(alias: str) -> DraftEntry | None:
    """Return the draft model of a model; None if none is known."""
    return next((entry for entry in drafts() if entry.model == alias), None)
