"""Memory that a model needs on each host, from the catalogue and the files on this machine; needs no network."""

from __future__ import annotations

from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.model.config import load_config
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.sizing.kv_cache import kv_bytes_per_token
from kimi_mlx.sizing.prefill import PREFILL_CHUNK
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import ModelRef, resolve_model_name

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
    )


def _repository(target: ModelRef) -> str | None:
    """Return the name of the model in its stores; None for a model that comes with kimi-mlx."""
    if target.entry is not None and target.entry.is_packaged:
        return None
    return target.repository or str(target.folder and target.folder.resolve())
