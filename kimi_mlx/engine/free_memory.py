"""Memory that MLX may still use on this host, the prefill chunk that fits into it, and what is left for caches."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.chunking import Holding, choose_chunk, prefill_bytes
from kimi_mlx.model.attention import is_fused
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.moe import MoE
from kimi_mlx.model.rope import is_gpu
from kimi_mlx.parallel.group import Group

PLANNED_CONTEXT = 32_768
"""Tokens for whose cache room is left when the chunk is chosen; the model's own limit if that is less."""

CACHE_SHARE = 0.7
"""Of the free memory: MLX keeps freed arrays for the next ones, and a buffer that grows is there twice for a moment."""

CONTEXTS = 8
"""So many full contexts are enough, where nobody asks for more."""

MIN_CACHE_TOKENS = 4096
"""Where less seems to be free, the estimate may be wrong: that much is tried."""

MOST_CACHE_TOKENS = 2**31 - 1

MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class Limits:
    """What the memory of all ranks allows.

    Args:
        chunk: tokens of prompts a step.
        cache_tokens: in the caches of all sequences.
    """

    chunk: int
    cache_tokens: int


def agreed_limits(model: Model, group: Group, cache_bytes: int | None = None, chunk: int | None = None) -> Limits:
    """The limits of a model, or of a rank's share of it: the smallest of all ranks; one gather.

    Args:
        model: the model.
        group: the ranks.
        cache_bytes: for the caches on each rank; None: most of what is free, as far as it is of use.
        chunk: None: as many as pay and fit.
    """
    config, holding, free = model.config, holding_of(model), free_bytes()
    context = min(config.max_position_embeddings, PLANNED_CONTEXT)
    token_bytes = len(model.layers) * (config.kv_lora_rank + config.qk_rope_head_dim) * holding.value_bytes
    chosen = chunk or choose_chunk(config, holding, free - context * token_bytes, context)
    if cache_bytes is None:
        cache_bytes = int(CACHE_SHARE * (free - prefill_bytes(config, holding, chosen, context)))
        cache_bytes = min(cache_bytes, CONTEXTS * config.max_position_embeddings * token_bytes)
    tokens = min(max(cache_bytes // token_bytes, MIN_CACHE_TOKENS), MOST_CACHE_TOKENS)
    least = group.gather(mx.array([chosen, tokens], mx.int32)).min(axis=0)
    return Limits(*cast("list[int]", least.tolist()))


def holding_of(model: Model) -> Holding:
    """What a rank holds of a model."""
    config = model.config
    rows = [layer.mlp.down_proj.columns for layer in model.layers if isinstance(layer.mlp, MoE)]
    return Holding(
        heads=max(layer.self_attn.num_heads for layer in model.layers),
        expert_rows=max(rows, default=0),
        value_bytes=model.layers[0]["input_layernorm"].itemsize,
        is_fused=is_fused(config.qk_head_dim, config.v_head_dim),
    )


def free_bytes() -> int:
    """On a GPU what it should still wire; else what the system can give, half of all memory where it does not say."""
    if is_gpu():
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    if found:
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
