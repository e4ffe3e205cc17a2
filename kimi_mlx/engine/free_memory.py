"""Memory that MLX may still use on this host, and the prefill chunk that fits into it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import cast

import mlx.core as mx

from kimi_mlx.engine.chunking import Holding, choose_chunk
from kimi_mlx.model.attention import is_fused
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.moe import MoE
from kimi_mlx.model.rope import is_gpu
from kimi_mlx.parallel.group import Group

PLANNED_CONTEXT = 32_768
"""Tokens for whose cache room is left when the chunk is chosen; the model's own limit if that is less."""

MEMINFO = Path("/proc/meminfo")


def agreed_chunk(model: Model, group: Group) -> int:
    """The prefill chunk for a model, or a rank's share of it: the smallest that any rank chooses; one gather."""
    config = model.config
    context = min(config.max_position_embeddings, PLANNED_CONTEXT)
    holding = holding_of(model)
    values = context * len(model.layers) * (config.kv_lora_rank + config.qk_rope_head_dim)
    chunk = choose_chunk(config, holding, free_bytes() - values * holding.value_bytes, context)
    return int(cast(float, group.gather(mx.array([float(chunk)])).min().item()))


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
