"""Memory that a host needs (weights, KV cache, workspace of prefill) and memory that its GPU can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kimi_mlx.planner.constants import EngineProfile
from kimi_mlx.planner.machines import Machine
from kimi_mlx.planner.model_shape import ModelShape
from kimi_mlx.planner.portions import Portion
from kimi_mlx.planner.streaming import Streaming, planned_rank_shape, portion_sizes
from kimi_mlx.sizing.draft import DraftMemory
from kimi_mlx.sizing.image_features import LARGEST_IMAGE_TOKENS, feature_bytes
from kimi_mlx.sizing.kv_cache import BFLOAT16_BYTES, kv_bytes_per_token
from kimi_mlx.sizing.prefill import prefill_bytes
from kimi_mlx.sizing.vision import encode_bytes


@dataclass(frozen=True)
class HostMemory:
    """Memory that a host needs and has.

    Args:
        host: name of the host.
        weights_bytes: size of its share of the weights.
        cache_bytes: size of the KV cache for the context.
        workspace_bytes: temporary memory of prefill at the end of the context, or of the encoding of an image on the
            host with the vision tower, whichever is more; and the features of an image, if the model sees.
        gpu_bytes: memory that the GPU can use now.
        raised_gpu_bytes: memory that the GPU can use after raising `iogpu.wired_limit_mb`.
        draft_bytes: size of the draft model with its cache, on the host of rank 0.
        kept_share: fraction of its routed experts that `weights_bytes` holds; the others are read from the SSD.
        experts_bytes: size of all routed experts of its share.
        expert_bytes: size of one routed expert of its share.
        smallest_bytes: minimum memory, with as few experts in memory as possible.
    """

    host: str
    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    gpu_bytes: int
    raised_gpu_bytes: int
    draft_bytes: int = 0
    kept_share: float = 1.0
    experts_bytes: int = 0
    expert_bytes: int = 0
    smallest_bytes: int = 0

    @property
    def needed_bytes(self) -> int:
        """Sum of weights, cache, workspace and draft model."""
        return self.weights_bytes + self.other_bytes

    @property
    def other_bytes(self) -> int:
        """Everything but the weights."""
        return self.cache_bytes + self.workspace_bytes + self.draft_bytes


def memory_by_rank(
    machines: Sequence[Machine],
    portions: Sequence[Portion],
    shape: ModelShape,
    engine: EngineProfile,
    context: int,
    draft: DraftMemory | None = None,
    streaming: Streaming | None = None,
) -> tuple[HostMemory, ...]:
    """Return the memory of each rank; that of rank 0 includes a draft model.

    `kimi-mlx plan`, `models`, `doctor`, `launch` and the status of a server all use this function.

    Args:
        machines: one machine per rank.
        portions: portion of each rank.
        shape: the model.
        engine: the program.
        context: number of tokens in the cache.
        draft: memory of the draft model; None without one.
        streaming: experts that are read from the SSD; None if all are in memory.
    """
    ranks = [
        host_memory(machine, portion, shape, engine, context)
        for machine, portion in zip(machines, portions, strict=True)
    ]
    if streaming is not None:
        engine = replace(engine, prefill_chunk=streaming.chunk)
        ranks = [
            replace(
                host,
                weights_bytes=experts.sizes.rest_bytes + experts.kept_bytes,
                workspace_bytes=workspace_bytes(portion, shape, engine, context),
                kept_share=experts.kept_share,
            )
            for host, portion, experts in zip(ranks, portions, streaming.ranks, strict=True)
        ]
    if draft is not None:
        draft_bytes = draft.total_bytes(context)
        ranks[0] = replace(ranks[0], draft_bytes=draft_bytes, smallest_bytes=ranks[0].smallest_bytes + draft_bytes)
    return tuple(ranks)


def host_memory(
    machine: Machine, portion: Portion, shape: ModelShape, engine: EngineProfile, context: int
) -> HostMemory:
    """Return the memory of a host that holds a portion of a model and a context of `context` tokens."""
    sizes = portion_sizes(portion, shape)
    cache, workspace = cache_bytes(portion, shape, context), workspace_bytes(portion, shape, engine, context)
    return HostMemory(
        machine.name,
        round(portion.held(shape.bytes, shape)),
        cache,
        workspace,
        machine.gpu_bytes,
        machine.raised_gpu_bytes,
        experts_bytes=sizes.all_bytes,
        expert_bytes=max(sizes.expert_bytes, default=0),
        smallest_bytes=sizes.rest_bytes + sizes.staging_bytes + cache + workspace,
    )


def cache_bytes(portion: Portion, shape: ModelShape, context: int) -> int:
    """Return the size of the KV cache. Latents have no heads, so every rank has all of them for its layers."""
    return context * kv_bytes_per_token(shape.config, portion.layers)


def bytes_per_token(shape: ModelShape, context: int) -> float:
    """Return the fewest bytes that decoding one token reads on all hosts: weights, chosen experts, KV cache."""
    whole = Portion(shape.layers, shape.moe_layers)
    routed = shape.moe_layers * shape.config.num_experts_per_tok * shape.bytes.expert
    return whole.fixed(shape.bytes) + shape.bytes.head + routed + cache_bytes(whole, shape, context)


def workspace_bytes(portion: Portion, shape: ModelShape, engine: EngineProfile, context: int) -> int:
    """Return the temporary memory of the last chunk of a prompt that fills the context. Not measured on a Mac yet.

    With vision, every host has the features of the largest image, and the one with the tower the memory to encode it.
    """
    config = shape.config
    rank_shape = planned_rank_shape(portion, shape)
    prefill = prefill_bytes(config, rank_shape, min(engine.prefill_chunk, context), context)
    if config.vision is None:
        return prefill
    encoding = encode_bytes(config.vision, BFLOAT16_BYTES, is_fused=True) if portion.vision else 0
    return max(prefill, encoding) + feature_bytes(config, LARGEST_IMAGE_TOKENS, BFLOAT16_BYTES)


def longest_context(
    machines: Sequence[Machine],
    portions: Sequence[Portion],
    shape: ModelShape,
    engine: EngineProfile,
    *,
    is_raised: bool,
    draft: DraftMemory | None = None,
    streaming: Streaming | None = None,
) -> int:
    """Return the longest context that fits on all hosts, up to the model's own limit; 0 if the weights do not fit.

    With `streaming`, a longer context leaves memory for fewer experts.
    """
    if streaming is not None:
        streaming = streaming.smallest

    def fits(context: int) -> bool:
        return all(
            host.needed_bytes <= (host.raised_gpu_bytes if is_raised else host.gpu_bytes)
            for host in memory_by_rank(machines, portions, shape, engine, context, draft, streaming)
        )

    low, high = 0, shape.context_tokens
    while low < high:  # binary search for the largest context that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
