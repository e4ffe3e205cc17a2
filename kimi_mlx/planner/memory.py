"""Memory of a host: its portion of the weights, the cache, the work space of prefill, and what the GPU may wire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimi_mlx.planner.constants import EngineProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import Portion
from kimi_mlx.sizing.kv_cache import BFLOAT16_BYTES, kv_bytes_per_token
from kimi_mlx.sizing.prefill import RankShape, prefill_bytes


@dataclass(frozen=True)
class HostMemory:
    """What a host needs and has.

    Args:
        host: its name.
        weights_bytes: of its portion.
        cache_bytes: of the context.
        workspace_bytes: of prefill at the end of the context.
        gpu_bytes: what its GPU may wire as it is.
        raised_gpu_bytes: the same after raising `iogpu.wired_limit_mb`.
    """

    host: str
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    gpu_bytes: int
    raised_gpu_bytes: int

    @property
    def needed_bytes(self) -> int:
        """All three."""
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes


def host_memory(
    machine: Machine, portion: Portion, shape: ModelShape, engine: EngineProfile, context: int
) -> HostMemory:
    """What a host needs for its portion of a model and a context of so many tokens."""
    return HostMemory(
        machine.name,
        round(portion.held(shape.bytes, shape)),
        cache_bytes(portion, shape, context),
        workspace_bytes(portion, shape, engine, context),
        machine.gpu_bytes,
        machine.raised_gpu_bytes,
    )


def cache_bytes(portion: Portion, shape: ModelShape, context: int) -> int:
    """Of the cache: latents have no heads, so every rank has them all, of its layers."""
    return context * kv_bytes_per_token(shape.config, portion.layers)


def bytes_per_token(shape: ModelShape, context: int) -> float:
    """What decoding one token must read at least, of all hosts together: weights, chosen experts and the cache."""
    whole = Portion(shape.layers, shape.moe_layers)
    routed = shape.moe_layers * shape.config.num_experts_per_tok * shape.bytes.expert
    return whole.fixed(shape.bytes) + shape.bytes.head + routed + cache_bytes(whole, shape, context)


def workspace_bytes(portion: Portion, shape: ModelShape, engine: EngineProfile, context: int) -> int:
    """Of one layer in the last chunk of a prompt that fills the context. An estimate: not measured on a Mac."""
    config = shape.config
    rank_shape = RankShape(
        heads=round(config.num_attention_heads * portion.heads),
        expert_rows=round(config.moe_intermediate_size * portion.expert_rows),
        value_bytes=BFLOAT16_BYTES,
        is_fused=True,
    )
    return prefill_bytes(config, rank_shape, min(engine.prefill_chunk, context), context)


def longest_context(
    machines: Sequence[Machine],
    portions: Sequence[Portion],
    shape: ModelShape,
    engine: EngineProfile,
    *,
    is_raised: bool,
) -> int:
    """Tokens of context that fit on all hosts, at most what the model was made for; 0 if not even the weights do."""

    def fits(context: int) -> bool:
        return all(
            host_memory(machine, portion, shape, engine, context).needed_bytes
            <= (machine.raised_gpu_bytes if is_raised else machine.gpu_bytes)
            for machine, portion in zip(machines, portions, strict=True)
        )

    low, high = 0, shape.context_tokens
    while low < high:  # the largest context that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
