"""Values that all ranks must agree on: limits, the time of chunks, and whether rank 0 has a vision tower."""

from __future__ import annotations

import sys
from dataclasses import astuple
from typing import cast

import numpy as np

from kimi_mlx.engine.free_memory import free_memory_bytes
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import NUMPY_MIN_MULTIPLY_ADDS, has_fused_attention, uses_numpy
from kimi_mlx.model.moe import MoE
from kimi_mlx.parallel.group import Group, gather_on_host
from kimi_mlx.parallel.sum_communicator import SumCommunicator
from kimi_mlx.sizing.engine_limits import EngineLimits, engine_limits
from kimi_mlx.sizing.prefill import RankShape
from kimi_mlx.sizing.step_time import ChunkCost, ChunkEstimate, HeldExperts, chunk_cost
from kimi_mlx.sizing.vision import MAX_PATCHES, encode_bytes


def agreed_limits(
    model: Model,
    group: Group,
    cache_bytes: int | None = None,
    chunk: int | None = None,
    num_draft_layers: int = 0,
    sequences: int | None = None,
) -> EngineLimits:
    """Return the smallest limits of any rank. Collective: one gather.

    Args:
        model: the model, or this rank's share of it.
        group: the ranks.
        cache_bytes: size of the KV caches on each rank; None for most of the free memory.
        chunk: prefill chunk; None for the largest useful one that fits.
        num_draft_layers: number of layers of the draft model on this rank, whose rows count like those of the model.
        sequences: maximum number of sequences that run at the same time; None for that of the device.
    """
    own_limits = engine_limits(
        model.config,
        rank_shape_of(model),
        len(model.layers) + num_draft_layers,
        free_memory_bytes(),
        cache_bytes=cache_bytes,
        chunk=chunk,
        largest_chunk=model.tuning.prefill_chunk,
        encode_bytes=largest_encoding_bytes(model),
        max_sequences=min(sequences or model.tuning.max_sequences, model.tuning.max_sequences),
    )
    smallest = gather_on_host(group, np.array(astuple(own_limits), np.int32)).min(axis=0)
    return EngineLimits(*cast("list[int]", smallest.tolist()))


def agreed_chunk_estimate(model: Model, group: Group, is_pipeline: bool) -> ChunkEstimate:
    """Return the estimate for the slowest rank, or for all stages of a pipeline together. Collective: one gather."""
    cost = chunk_cost(
        model.config,
        rank_shape_of(model),
        len(model.layers),
        held_experts_of(model),
        model.tuning,
        *_divided_queries(model, group),
    )
    costs = gather_on_host(group, np.array(astuple(cost), np.float32)).astype(np.float64)
    agreed = costs.sum(axis=0) if is_pipeline else costs.max(axis=0)
    return ChunkEstimate(ChunkCost(*cast("list[float]", agreed.tolist())), model.config)


def _divided_queries(model: Model, group: Group) -> tuple[int, float]:
    """Return the number of ranks that divide the queries of a chunk, and seconds per token of a layer's gather."""
    split = model.communicator.query_split if isinstance(model.communicator, SumCommunicator) else None
    if split is None:
        return 1, 0.0
    tokens = model.tuning.prefill_chunk
    if split.bounds([(0, tokens)]) is None:  # it would cost more than it saves
        return 1, 0.0
    return group.size, split.gather_s(tokens / group.size * split.token_bytes) / tokens


def held_experts_of(model: Model) -> HeldExperts:
    """Return the routed experts of a rank's share of a model."""
    config = model.config
    moes = [layer.mlp for layer in model.layers if isinstance(layer.mlp, MoE)]
    num_held = max((min(moe.num_experts, config.n_routed_experts) for moe in moes), default=0)
    return HeldExperts(
        per_token=config.num_experts_per_tok * num_held / config.n_routed_experts,
        num_bytes=3 * sum(moe.down_proj_bytes for moe in moes),  # gate and up have as many values
    )


def has_tower(model: Model, group: Group) -> bool:
    """Return whether rank 0 holds the vision tower. Collective for models with vision: one gather."""
    if model.config.vision is None:
        return False
    return bool(gather_on_host(group, np.array([model.vision is not None]))[0, 0])


def largest_encoding_bytes(model: Model) -> int:
    """Return the temporary memory of the encoding of the largest image; 0 on a rank without the vision tower."""
    if model.vision is None:
        return 0
    config, value_bytes = model.vision.config, model.vision["position_table"].itemsize
    width = config.head_dim
    is_fused = has_fused_attention(device_kind(), value_bytes, width, width, MAX_PATCHES)
    return encode_bytes(config, value_bytes, is_fused)


def rank_shape_of(model: Model) -> RankShape:
    """Return the dimensions of a rank's share of a model."""
    config = model.config
    rows = [layer.mlp.expert_rows for layer in model.layers if isinstance(layer.mlp, MoE)]
    value_bytes = model.layers[0]["input_layernorm"].itemsize
    return RankShape(
        heads=max(layer.self_attn.num_heads for layer in model.layers),
        expert_rows=max(rows, default=0),
        value_bytes=value_bytes,
        is_fused=has_fused_attention(
            device_kind(), value_bytes, config.qk_head_dim, config.v_head_dim, model.tuning.prefill_chunk
        ),
        device=device_kind(),
        in_numpy=uses_numpy(device_kind(), sys.platform, value_bytes, NUMPY_MIN_MULTIPLY_ADDS),
    )
