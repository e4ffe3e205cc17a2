"""What a model needs of each host, from the catalogue and from what of it is on this machine; asks nobody."""

from __future__ import annotations

from kimi_mlx.cluster.doctor.memory_need import ModelNeed
from kimi_mlx.engine.chunking import PREFILL_CHUNK
from kimi_mlx.hub.catalogue import CONTEXT_TOKENS, OVERHEAD
from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.store.locate import Target, config_folder, understand

K2_HIDDEN_SIZE, K2_VOCAB_SIZE, K2_KV_BYTES = 7168, 163840, 70272
"""Of the big models; for one of which not even the configuration is here."""

KV_VALUE_BYTES = 2


def need_of(name: str) -> ModelNeed:
    """What a model needs.

    Args:
        name: an alias, a folder, or a repository.

    Raises:
        UsageError: no such thing, or a model that we refuse.
        ConfigError: a configuration that we cannot serve.
    """
    target = understand(name)
    folder = config_folder(target)
    config = None if folder is None else load_config(folder)
    entry = target.entry
    weights = None if entry is None else entry.weights_bytes
    if weights is None and folder is not None:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or None
    kv_bytes = None if entry is None else entry.kv_bytes_per_token
    return ModelNeed(
        name=name,
        repository=_repository(target),
        weights_bytes=weights,
        overhead=OVERHEAD,
        cache_bytes=CONTEXT_TOKENS * (kv_bytes or _kv_bytes(config)),
        hidden_size=config.hidden_size if config else K2_HIDDEN_SIZE,
        vocab_size=config.vocab_size if config else K2_VOCAB_SIZE,
        prefill_chunk=PREFILL_CHUNK,
        is_here=folder is not None,
    )


def _repository(target: Target) -> str | None:
    """As stores name it; None for what comes with kimi-mlx."""
    if target.entry is not None and target.entry.is_packaged:
        return None
    return target.repository or str(target.folder and target.folder.resolve())


def _kv_bytes(config: ModelConfig | None) -> int:
    """Of the cache, a token."""
    if config is None:
        return K2_KV_BYTES
    return (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers * KV_VALUE_BYTES
