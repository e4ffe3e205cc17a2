"""Memory that MLX can still use on this host, and the engine limits that all ranks agree on."""

from __future__ import annotations

import os
import re
from dataclasses import astuple
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from kimi_mlx.model.decoder import Model
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import has_fused_attention
from kimi_mlx.model.moe import MoE
from kimi_mlx.parallel.group import Group, gather_on_host
from kimi_mlx.sizing.engine_limits import EngineLimits, engine_limits
from kimi_mlx.sizing.prefill import RankShape

MEMINFO = Path("/proc/meminfo")


def agreed_limits(model: Model, group: Group, cache_bytes: int | None = None, chunk: int | None = None) -> EngineLimits:
    """Return the smallest limits of any rank. Collective: one gather.

    Args:
        model: the model, or this rank's share of it.
        group: the ranks.
        cache_bytes: size of the KV caches on each rank; None for most of the free memory.
        chunk: prefill chunk; None for the largest useful one that fits.
    """
    own_limits = engine_limits(
        model.config,
        rank_shape_of(model),
        len(model.layers),
        free_memory_bytes(),
        cache_bytes=cache_bytes,
        chunk=chunk,
        largest_chunk=model.tuning.prefill_chunk,
    )
    smallest = gather_on_host(group, np.array(astuple(own_limits), np.int32)).min(axis=0)
    return EngineLimits(*cast("list[int]", smallest.tolist()))


def rank_shape_of(model: Model) -> RankShape:
    """Return the dimensions of a rank's share of a model."""
    config = model.config
    rows = [layer.mlp.down_proj.columns for layer in model.layers if isinstance(layer.mlp, MoE)]
    value_bytes = model.layers[0]["input_layernorm"].itemsize
    return RankShape(
        heads=max(layer.self_attn.num_heads for layer in model.layers),
        expert_rows=max(rows, default=0),
        value_bytes=value_bytes,
        is_fused=has_fused_attention(
            device_kind(), value_bytes, config.qk_head_dim, config.v_head_dim, model.tuning.prefill_chunk
        ),
    )


def free_memory_bytes() -> int:
    """Return free memory.

    Metal: recommended working set minus active memory. CUDA: free memory of the device. CPU: MemAvailable, or half of
    the RAM.
    """
    kind = device_kind()
    if kind == "metal":
        return int(mx.device_info()["max_recommended_working_set_size"]) - mx.get_active_memory()
    if kind == "cuda":
        return int(mx.device_info()["free_memory"]) + mx.get_cache_memory()
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        match = None
    if match:
        return int(match[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
