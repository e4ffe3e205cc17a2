"""Models of a few equal MoE layers with made-up weights, to time a layer of a model that is not loaded.

Letters: as in kimi_mlx.model.tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from kimi_mlx.model.batch_layout import BatchLayout
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.decoder import Communicator, Model
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight

MAX_BYTES = 2**30
"""Largest size of the routed experts; a larger model gets fewer of them. The time of a token does not depend on it."""

CODES = 0x5A5A5A5A
"""Packed values of all quantized matrices: alternating 10 and 5, at 4 bits."""


class SimulatedCommunicator(Communicator):
    """Communicator of a rank that computes its share of a layer without the others, on random hidden states.

    Args:
        hidden_size: D.
        dtype: dtype of the hidden states.
        num_query_ranks: number of ranks that divide the queries of a step; 1 if they do not.
    """

    def __init__(self, hidden_size: int, dtype: mx.Dtype, num_query_ranks: int):
        self._hidden_size, self._dtype, self._num_query_ranks = hidden_size, dtype, num_query_ranks

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        """Return random hidden states."""
        return mx.random.normal((*tokens.shape, self._hidden_size), key=mx.random.key(0)).astype(self._dtype)

    def divide_queries(self, layout: BatchLayout) -> None:
        """Divide the queries evenly, as if this rank were the last one."""
        ranks = self._num_query_ranks
        if 1 < ranks <= layout.length:
            layout.divide([rank * layout.length // ranks for rank in range(ranks + 1)], ranks - 1)

    def gather_queries(self, attended: mx.array, bounds: Sequence[int]) -> mx.array:
        """Repeat this rank's outputs instead of those of the others."""
        count = bounds[-1]
        repeats = -(-count // attended.shape[1])
        return mx.concatenate([attended] * repeats, axis=1)[:, :count]


def sample_model(
    config: ModelConfig, dtype: mx.Dtype, num_layers: int, *, num_shares: int = 1, has_all_heads: bool = True
) -> Model:
    """Return a rank's share of a model of equal layers, which share their weights; without embedding and head.

    Args:
        config: dimensions of the model, with the quantization of all matrices; see kimi_mlx.planner.calibration.
        dtype: compute dtype.
        num_layers: number of layers.
        num_shares: number of ranks that divide the rows of every expert.
        has_all_heads: whether the rank has all attention heads; it divides the queries then.
    """
    quantization = config.quantization
    rows = _share(config.moe_intermediate_size, num_shares, quantization)
    heads = config.num_attention_heads if has_all_heads else -(-config.num_attention_heads // num_shares)
    bytes_per_expert = 3 * config.hidden_size * rows * (0.6 if quantization is not None else dtype.size)
    limit = max(config.num_experts_per_tok * config.n_group, int(MAX_BYTES / bytes_per_expert))
    num_experts = min(config.n_routed_experts, limit) // config.n_group * config.n_group
    config = replace(
        config,
        num_hidden_layers=num_layers,
        first_k_dense_replace=0,
        moe_layer_freq=1,
        n_routed_experts=num_experts,
        moe_intermediate_size=rows,
        num_attention_heads=heads,
    )
    layer = _layer(config, quantization, dtype)
    communicator = SimulatedCommunicator(config.hidden_size, dtype, num_shares if has_all_heads else 1)
    return Model(config, LayerWeights({}), [layer] * num_layers, communicator)


def sample_head(config: ModelConfig, dtype: mx.Dtype, num_shares: int = 1) -> Weight:
    """Return a rank's share of the output head."""
    return _matrix(config.quantization, dtype, -(-config.vocab_size // num_shares), config.hidden_size)


def _share(rows: int, num_shares: int, quantization: Quantization | None) -> int:
    """Return the largest share of the rows, in whole groups."""
    unit = 1 if quantization is None else quantization.group_size
    return min(rows, -(-rows // (num_shares * unit)) * unit)


def _layer(config: ModelConfig, quantization: Quantization | None, dtype: mx.Dtype) -> LayerWeights:
    hidden, heads, latent, rope = (
        config.hidden_size,
        config.num_attention_heads,
        config.kv_lora_rank,
        config.qk_rope_head_dim,
    )
    inner, q_rank, stack = (
        config.moe_intermediate_size,
        config.q_lora_rank,
        config.n_routed_experts + config.n_shared_experts,
    )

    def matrix(*shape: int) -> list[Weight]:
        return [_matrix(quantization, dtype, *shape)]

    def norm(width: int) -> list[Weight]:
        return [Weight(mx.ones((width,), dtype), dtype=dtype)]

    q_rows = heads * config.qk_head_dim
    router = mx.random.normal((config.n_routed_experts, hidden), key=mx.random.key(1)) * hidden**-0.5
    entries = {
        "input_layernorm": norm(hidden),
        "post_attention_layernorm": norm(hidden),
        "self_attn.qkv_a_proj": matrix((q_rank or q_rows) + latent + rope, hidden),
        "self_attn.kv_a_layernorm": norm(latent),
        "self_attn.embed_q": matrix(heads, latent, config.qk_nope_head_dim),
        "self_attn.unembed_out": matrix(heads, config.v_head_dim, latent),
        "self_attn.o_proj": matrix(hidden, heads * config.v_head_dim),
        "mlp.gate": [Weight(router)],
        "mlp.gate.e_score_correction_bias": [Weight(mx.zeros((config.n_routed_experts,)))],
        "mlp.experts.gate_up_proj": matrix(stack, 2 * inner, hidden),
        "mlp.experts.down_proj": matrix(stack, hidden, inner),
    }
    if q_rank is not None:
        entries |= {"self_attn.q_a_layernorm": norm(q_rank), "self_attn.q_b_proj": matrix(q_rows, q_rank)}
    return LayerWeights(entries, latent_first=True, num_fused_shared=config.n_shared_experts)


def _matrix(quantization: Quantization | None, dtype: mx.Dtype, *shape: int) -> Weight:
    *stack, rows, columns = shape
    if quantization is None or columns % quantization.group_size:
        return Weight(mx.full(shape, columns**-0.5, dtype), dtype=dtype)
    packed = mx.full((*stack, rows, columns * quantization.bits // 32), CODES, mx.uint32)
    groups = (*stack, rows, columns // quantization.group_size)
    if quantization.mode != "affine":  # scales are 8-bit floats: a small one
        return Weight(packed, mx.full(groups, 112, mx.uint8), None, quantization, dtype)
    scale = 0.2 * columns**-0.5
    biases = mx.full(groups, -scale * (2**quantization.bits - 1) / 2, dtype)
    return Weight(packed, mx.full(groups, scale, dtype), biases, quantization, dtype)
