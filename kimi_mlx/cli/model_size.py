"""Memory and dimensions of a model by its name, from the catalogue and the files on this machine; needs no network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kimi_mlx.cluster.doctor.memory_need import DiskSpace, ModelNeed
from kimi_mlx.errors import ConfigError, UsageError, WeightsError
from kimi_mlx.files import free_disk_bytes
from kimi_mlx.hub.catalogue import CatalogueEntry
from kimi_mlx.hub.environment import hub_cache
from kimi_mlx.model.config import load_config
from kimi_mlx.model.draft_config import canonical_name, load_draft_config
from kimi_mlx.model.draft_names import EMBEDDING
from kimi_mlx.planner.drafts import DraftShape, make_draft_shape, published_draft_config
from kimi_mlx.planner.model_shape import ModelShape, known_models, known_shape, shape_of_config
from kimi_mlx.sizing.draft import draft_weight_bytes
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from kimi_mlx.sizing.prefill import PREFILL_CHUNK
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import ModelRef, resolve_draft_name, resolve_model_name
from kimi_mlx.store.vision import sees_images
from kimi_mlx.weights.index import read_index

FALLBACK_MODEL = "kimi-k2"
"""Model whose dimensions are assumed for a big one whose configuration is not on this machine."""


def memory_requirement(name: str) -> ModelNeed:
    """Return the memory and dimensions of a model.

    Args:
        name: alias, folder or repository.

    Raises:
        UsageError: there is no such model, or it is not supported.
        ConfigError: its configuration is not supported.
    """
    target = resolve_model_name(name)
    folder = config_folder(target)
    config = known_shape(FALLBACK_MODEL).config if folder is None else load_config(folder)
    entry = target.entry
    weights = None if entry is None else entry.weights_bytes
    if weights is None and folder is not None:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    kv_bytes = None if entry is None else entry.kv_bytes_per_token
    return ModelNeed(
        name=name,
        repository=_repository(target),
        weights_bytes=weights,
        cache_bytes=CONTEXT_TOKENS * (kv_bytes or kv_bytes_per_token(config)),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        prefill_chunk=PREFILL_CHUNK,
        is_here=folder is not None,
        download_bytes=None if entry is None else entry.size_bytes,
    )


def download_disk() -> DiskSpace:
    """Return the disk of a download without stores: that of the Hugging Face cache."""
    folder = hub_cache()
    return DiskSpace(str(folder), free_disk_bytes(folder), "HF_HUB_CACHE")


def draft_shape(draft: str, model: str, *, is_assumed: bool = False) -> DraftShape:
    """Return a draft model's dimensions and acceptance: of the files on this machine, else of a known draft model.

    Args:
        draft: value of `--draft`.
        model: name of the model for which it drafts.
        is_assumed: whether a draft model that is not on this machine is taken for one like the known ones.

    Raises:
        UsageError: there is no such draft model, or its dimensions are not known here.
        ConfigError: its configuration is not supported.
    """
    target = resolve_draft_name(draft, resolve_model_name(model))
    folder = config_folder(target)
    if folder is not None:
        return make_draft_shape(target.name, load_draft_config(folder), target.draft, _has_embedding(folder))
    if target.draft is not None or is_assumed:
        return make_draft_shape(target.name, published_draft_config(), target.draft)
    raise UsageError(
        f"the dimensions of the draft model `{draft}` are not known here",
        hint=f"download it first: `kimi-mlx download {draft}`",
    )


def _has_embedding(folder: Path) -> bool:
    """Return whether the files of a draft model have an embedding; False while they are not all there."""
    try:
        return any(canonical_name(name) == EMBEDDING for name in read_index(folder))
    except WeightsError:
        return False


def draft_download_bytes(draft: str, model: str) -> int:
    """Return the size of a draft model that is not on this machine, about that of its matrices; 0 for one that is.

    Args:
        draft: value of `--draft`.
        model: name of the model for which it drafts.

    Raises:
        UsageError: there is no such draft model, or its dimensions are not known here.
        ConfigError: its configuration is not supported.
    """
    if config_folder(resolve_draft_name(draft, resolve_model_name(model))) is not None:
        return 0
    return draft_weight_bytes(draft_shape(draft, model).config, quantization=None)


def _repository(target: ModelRef) -> str | None:
    """Return the name of the model in its stores; None for a model that comes with kimi-mlx."""
    if target.entry is not None and target.entry.is_packaged:
        return None
    return target.repository or str(target.folder and target.folder.resolve())


def entry_shape(entry: CatalogueEntry) -> ModelShape | None:
    """Return the dimensions and sizes of a known model; None for the bundled model and for refused ones."""
    if entry.is_packaged or entry.refused is not None:
        return None
    try:
        return model_shape(entry.alias)
    except (ConfigError, WeightsError):  # a broken checkpoint on this machine: an error when it is loaded
        return known_shape(entry.alias)


def model_shape(name: str) -> ModelShape:
    """Return a model's dimensions and sizes: of the checkpoint on this machine, else those of a known model.

    Raises:
        UsageError: there is no such model, or its dimensions are not known here.
        WeightsError: the files of the checkpoint or the store are unreadable.
    """
    target = resolve_model_name(name)
    folder = config_folder(target)
    if folder is not None:
        config = load_config(folder)
        return shape_of_config(name, config if sees_images(folder, config) else replace(config, vision=None))
    alias = target.entry.alias if target.entry is not None else None
    if alias in known_models():
        return known_shape(alias)
    raise UsageError(
        f"the dimensions of `{name}` are not known here",
        hint=f"give a folder with its `config.json`, or one of {', '.join(known_models())}",
    )
