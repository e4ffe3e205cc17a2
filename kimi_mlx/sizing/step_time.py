"""Estimated time of a chunk of a prompt, and the largest chunk that leaves running answers without long pauses.

The estimate depends on token counts and on constants of the device, never on measured times, so all ranks choose the
same chunk. Does not import MLX.
"""

from __future__ import annotations

from dataclasses import dataclass

from kimi_mlx.model.attention_cost import AttentionCost, AttentionShape
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device_traits import Tuning
from kimi_mlx.sizing.prefill import RankShape

SHARED_STEP_S = 0.2
"""Time for chunks of prompts in a step that other sequences decode in; a reader notices a pause of 0.3 s."""

CHUNK_STEP = 8
"""While other sequences decode, lengths of chunks are multiples of this, or 4, 2 or 1 if even this takes too long."""


@dataclass(frozen=True)
class HeldExperts:
    """The routed experts on a rank.

    Args:
        per_token: mean number of a token's chosen experts that the rank holds, in whole or in part.
        num_bytes: bytes of all of them.
    """

    per_token: float
    num_bytes: int


@dataclass(frozen=True)
class ChunkCost:
    """Time of the parts of a chunk, on the slowest rank; in a pipeline, on all ranks together.

    Args:
        token_s: seconds per token for the matrices of all layers.
        experts_s: seconds to read all routed experts.
        expand_s: seconds to expand one cached token into the keys and values of the heads.
        head_pair_s: seconds per query and key, by heads.
        latent_pair_s: seconds per query and key, in the latent space.

    If ranks divide the queries of a step, the times of queries are those of a rank's part, and those of the gathers are
    in `token_s`.
    """

    token_s: float
    experts_s: float
    expand_s: float
    head_pair_s: float
    latent_pair_s: float


def chunk_cost(
    config: ModelConfig,
    rank_shape: RankShape,
    num_layers: int,
    experts: HeldExperts,
    tuning: Tuning,
    num_query_ranks: int = 1,
    gather_s: float = 0.0,
) -> ChunkCost:
    """Return the times on one rank.

    Args:
        config: the model's dimensions.
        rank_shape: dimensions of the rank's share.
        num_layers: number of layers on the rank.
        experts: the routed experts on the rank.
        tuning: constants of the device.
        num_query_ranks: number of ranks that divide the queries of a step; 1 if they do not.
        gather_s: seconds per token and layer of the gather of their outputs.
    """
    attention_cost = AttentionCost(AttentionShape.of(config, rank_shape.heads), tuning)
    shape, width = attention_cost.shape, config.hidden_size
    q_width = shape.heads * config.qk_head_dim
    q_values = width * q_width if config.q_lora_rank is None else config.q_lora_rank * (width + q_width)
    kv_values = width * (config.kv_lora_rank + config.qk_rope_head_dim)
    of_queries = (q_values + shape.heads * config.v_head_dim * width) / num_query_ranks
    attention = of_queries + kv_values + shape.expansion
    mlp = (experts.per_token + config.n_shared_experts) * 3 * width * rank_shape.expert_rows
    return ChunkCost(
        token_s=num_layers * (2 * (attention + mlp) / tuning.weight_flops + gather_s),
        experts_s=experts.num_bytes / tuning.read_bytes_per_s,
        expand_s=num_layers * attention_cost.expand_s,
        head_pair_s=num_layers * attention_cost.head_pair_s / num_query_ranks,
        latent_pair_s=num_layers * attention_cost.latent_pair_s / num_query_ranks,
    )


class ChunkEstimate:
    """Estimates the time of chunks of prompts.

    Args:
        cost: times that all ranks agree on.
        config: the model's dimensions.
    """

    def __init__(self, cost: ChunkCost, config: ModelConfig):
        self._cost = cost
        self._untouched = 1 - config.num_experts_per_tok / config.n_routed_experts

    def seconds(self, offset: int, length: int) -> float:
        """Estimate the time of `length` new tokens after `offset` cached ones."""
        cost, total = self._cost, offset + length
        read_s = cost.experts_s * (1 - self._untouched**length)
        # as in AttentionCost.is_latent: the projections of the new tokens are part of token_s
        latent_s = length * total * cost.latent_pair_s
        heads_s = offset * cost.expand_s + length * total * cost.head_pair_s
        return max(read_s, length * cost.token_s) + min(latent_s, heads_s)

    def largest_chunk(self, offset: int, seconds: float, limit: int) -> int:
        """Return the largest size of a chunk, up to `limit`, that takes at most `seconds`; 0 if none does."""
        lengths = [*range(limit - limit % CHUNK_STEP, 0, -CHUNK_STEP), *(n for n in (4, 2, 1) if n <= limit)]
        return next((length for length in lengths if self.seconds(offset, length) <= seconds), 0)


class ChunkBudget:
    """The prompt tokens that still fit in a step. The first chunk has at least one token.

    Args:
        chunk: maximum number of prompt tokens per step.
        estimate: estimates the time of chunks; None if no other sequence waits for the step.
    """

    def __init__(self, chunk: int, estimate: ChunkEstimate | None):
        self._estimate, self._seconds = estimate, SHARED_STEP_S
        self._tokens = chunk if estimate is None else max(chunk // 2, 1)
        self._least = 1

    def largest(self, offset: int) -> int:
        """Return the maximum number of tokens of a chunk after `offset` cached tokens; 0 if the step is full."""
        if self._estimate is None:
            return self._tokens
        return max(self._least, self._estimate.largest_chunk(offset, self._seconds, self._tokens))

    def take(self, offset: int, length: int) -> None:
        """Subtract a chunk of `length` tokens after `offset` cached tokens."""
        self._tokens, self._least = self._tokens - length, 0
        if self._estimate is not None:
            self._seconds -= self._estimate.seconds(offset, length)
