"""Choose the memory for the routed experts of a rank before its share of the model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.engine.free_memory import free_memory_bytes
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import TUNINGS, has_fused_attention
from kimi_mlx.parallel.all_ranks import run_on_all_ranks
from kimi_mlx.parallel.group import Group, SingleGroup, gather_on_host
from kimi_mlx.parallel.placement import RankShare, normalize_strategy
from kimi_mlx.runtime.load import compute_dtype, place_checkpoint
from kimi_mlx.sizing.engine_limits import StreamingLimits, bytes_beside_weights, streamed_chunk
from kimi_mlx.sizing.expert_memory import ExpertMemory
from kimi_mlx.sizing.experts import ExpertBudget, ExpertSizes
from kimi_mlx.sizing.prefill import RankShape
from kimi_mlx.sizing.ssd import ASSUMED_SSD_BYTES_PER_S, THIS_HOST, saved_speeds
from kimi_mlx.sizing.streaming import SYNC_S, expected_misses, paying_sequences
from kimi_mlx.store.manifest import StoredFile
from kimi_mlx.store.store_folders import stored_ranks
from kimi_mlx.store.stores import open_manifest
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, split_experts
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.layer_plan import plan_layer, plan_top, plan_vision
from kimi_mlx.weights.plan import LayerPlan
from kimi_mlx.weights.reader import open_checkpoint

FLOATS = ("F32", "F16", "BF16")
"""Stored types that are cast to the compute dtype."""

LARGEST_GROWTH = 4
"""Largest ratio of a model's size in memory to that of its files: FP8 becomes float32 on a CPU."""


def choose_expert_budget(
    setting: ExpertMemory,
    folder: Path,
    config: ModelConfig,
    dtype: str | None = None,
    group: Group | None = None,
    strategy: str = "hybrid",
    *,
    cache_bytes: int | None = None,
    num_local_ranks: int = 1,
) -> ExpertBudget | None:
    """Return the memory for the routed experts of this rank; None if all ranks keep all of them in memory. Collective.

    Ranks may get different budgets: each reads its own experts.

    Args:
        setting: the user's setting.
        folder: checkpoint, or store of this rank.
        config: configuration of the model.
        dtype: type to compute in; None uses the default of kimi_mlx.runtime.load.
        group: ranks that share the model.
        strategy: split of the model.
        cache_bytes: size of the KV caches; None for that of a usual context.
        num_local_ranks: number of ranks on this host, which divide its free memory.

    Raises:
        MemoryLimitError: the model does not fit even if its experts are read from the SSD.
        KimiMlxError: files are missing or broken.
    """
    if setting.mode == "all":
        return None
    group = group or SingleGroup()
    strategy = normalize_strategy(strategy, group.size)
    free_bytes = free_memory_bytes() // num_local_ranks
    is_small = setting.mode == "auto" and LARGEST_GROWTH * _file_bytes(folder, group.rank) < free_bytes / 2

    def choose() -> tuple[ExpertSizes, int | None, StreamingLimits]:
        compute = compute_dtype(dtype, config)
        share, sizes = expert_sizes(folder, config, compute, group, strategy)
        shape = rank_shape(config, share, compute.size)
        chunk = streamed_chunk(config, shape, free_bytes - sizes.rest_bytes)
        layers = config.num_hidden_layers if share is None else len(share.layers)
        other_bytes = bytes_beside_weights(config, shape, layers, chunk, cache_bytes)
        budget = sizes.budget(setting, free_bytes, other_bytes)
        sequences = _paying_sequences(config, sizes, budget)
        if strategy.startswith("pipeline"):  # a sequence uses one SSD at a time
            sequences *= group.size
        return sizes, budget, StreamingLimits(chunk, sequences)

    # both are barriers: no rank loads while another one on its host measures the free memory
    choice = run_on_all_ranks(group, lambda: None if is_small else choose())
    does_stream = choice is not None and choice[1] is not None
    if not gather_on_host(group, np.array([does_stream])).any():
        return None
    sizes, budget, limits = run_on_all_ranks(group, lambda: choose() if choice is None else choice)
    smallest = gather_on_host(group, np.array(astuple(limits), np.int32)).min(axis=0)
    return ExpertBudget.of(sizes, budget, StreamingLimits(*map(int, smallest)))


def _paying_sequences(config: ModelConfig, sizes: ExpertSizes, budget_bytes: int | None) -> int:
    """Return the maximum number of concurrent sequences; see kimi_mlx.sizing.streaming.paying_sequences."""
    tuning = TUNINGS[device_kind()]
    if budget_bytes is None:
        return tuning.max_sequences
    layers = len(sizes.expert_bytes)
    kept = sizes.num_kept(budget_bytes) / layers
    chosen = min(sizes.num_chosen, sizes.num_held)
    misses = expected_misses(sizes.num_held, chosen, kept)
    saved = saved_speeds().get(THIS_HOST)
    rate = ASSUMED_SSD_BYTES_PER_S if saved is None else saved.best_bytes_per_s
    miss_s = misses * sum(sizes.expert_bytes) / rate
    hits_s = (chosen - misses) * sum(sizes.expert_bytes) / tuning.read_bytes_per_s
    fixed_s = sizes.rest_bytes / tuning.read_bytes_per_s + layers * SYNC_S + hits_s
    return paying_sequences(fixed_s, miss_s, sizes.num_held, chosen, kept, tuning.max_sequences)


def rank_shape(config: ModelConfig, share: RankShare | None, value_bytes: int) -> RankShape:
    """Return the dimensions of a rank's share of a model that is not loaded yet.

    Args:
        config: dimensions of the model.
        share: share of the rank; None for the whole model.
        value_bytes: bytes per value of the compute dtype.
    """
    kind = device_kind()
    chunk = TUNINGS[kind].prefill_chunk
    return RankShape(
        heads=config.num_attention_heads if share is None else len(share.heads),
        expert_rows=config.moe_intermediate_size if share is None else len(share.expert_rows),
        value_bytes=value_bytes,
        is_fused=has_fused_attention(kind, value_bytes, config.qk_head_dim, config.v_head_dim, chunk),
        device=kind,
    )


def expert_sizes(
    folder: Path, config: ModelConfig, dtype: mx.Dtype, group: Group, strategy: str
) -> tuple[RankShare | None, ExpertSizes]:
    """Return the share of a rank and its sizes in memory, without reading a tensor.

    Args:
        folder: checkpoint, or store of this rank.
        config: configuration of the model.
        dtype: type to compute in.
        group: ranks that share the model.
        strategy: split of the model, normalized.

    Raises:
        KimiMlxError: files are missing or broken.
    """
    if stored_ranks(folder):
        manifest = open_manifest(folder, group.rank, group.size, strategy)
        share = manifest.placement.shares[group.rank]
        layers = [_stored_arrays(file) for file in manifest.all_files]
    else:
        share = None if group.size == 1 else place_checkpoint(folder, config, group.size, strategy).shares[group.rank]
        checkpoint = open_checkpoint(folder, config).checkpoint
        plans = [plan_layer(checkpoint, layer, share) for layer in range(config.num_hidden_layers)]
        layers = [
            _planned_arrays(plan) for plan in (*plans, plan_top(checkpoint, share), plan_vision(checkpoint, share))
        ]
    rest_bytes = sum(_memory_bytes(array, dtype) for layer in layers for array in layer.rest)
    with_experts = [layer for layer in layers if layer.num_experts]
    expert_bytes = [sum(_memory_bytes(array, dtype) for array in layer.expert) for layer in with_experts]
    num_held = max((layer.num_experts for layer in with_experts), default=0)
    return share, ExpertSizes(rest_bytes, tuple(expert_bytes), num_held, config.num_experts_per_tok)


@dataclass(frozen=True)
class _Array:
    """An array of a file: entry of the canonical tree, stored type, and shape."""

    entry: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _LayerArrays:
    """Arrays of a file: `expert` has those of one routed expert, `rest` all others."""

    rest: Sequence[_Array]
    expert: Sequence[_Array] = ()
    num_experts: int = 0


def _stored_arrays(file: StoredFile) -> _LayerArrays:
    rest = [
        _Array(entry, array.dtype, array.shape)
        for entry, parts in file.entries.items()
        for part in parts
        for array in part.arrays.values()
    ]
    if file.experts is not None:
        expert = [_Array(EXPERT_ENTRIES[array.matrix], array.dtype, array.shape) for array in file.experts.arrays]
        return _LayerArrays(rest, expert, file.experts.num_experts)
    stacks = [array for array in rest if array.entry in EXPERT_ENTRIES.values()]
    if not stacks:
        return _LayerArrays(rest)
    others = [array for array in rest if array not in stacks]
    expert = [replace(array, shape=array.shape[1:]) for array in stacks]
    shared = [replace(array, shape=(file.num_fused_shared, *array.shape[1:])) for array in stacks]
    return _LayerArrays([*others, *shared], expert, stacks[0].shape[0] - file.num_fused_shared)


def _planned_arrays(plan: LayerPlan) -> _LayerArrays:
    others, experts = split_experts(plan)
    rest = [
        _Array(entry, array.dtype, array.shape)
        for entry, parts in others.entries.items()
        for part in parts
        for array in part.arrays
    ]
    if experts is None:
        return _LayerArrays(rest)
    expert = [_Array(EXPERT_ENTRIES[array.matrix], array.dtype, array.shape) for array in experts.arrays]
    return _LayerArrays(rest, expert, experts.num_experts)


def _memory_bytes(array: _Array, dtype: mx.Dtype) -> int:
    is_router = array.entry == "mlp.gate" or array.entry.startswith("mlp.gate.")
    one = 4 if is_router else dtype.size if array.dtype in FLOATS else DTYPE_BYTES[array.dtype]
    return math.prod(array.shape) * one


def _file_bytes(folder: Path, rank: int) -> int:
    """Return the size of all files from which a rank may load."""

    def sizes(files: Iterable[Path]) -> int:
        return sum(file.stat().st_size for file in files)

    own = folder / f"rank-{rank}"
    return sizes((own if own.is_dir() else folder).glob("*.safetensors"))
