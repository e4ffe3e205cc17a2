"""A random model of two layers, dense and mixture of experts, at K2's widths, in memory.

Letters: D hidden_size, H num_attention_heads, N qk_nope_head_dim, P qk_rope_head_dim, R kv_lora_rank, V v_head_dim,
E n_routed_experts.
"""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.checks import Sizes
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight
from kimi_mlx.planner.model_shape import known_shape
from kimi_mlx.weights.assemble import make_weight

VOCAB_SIZE = 4096
"""K2 has 163,840; embedding and head are plain matrices, of which a part is enough."""

QUANTIZATION = Quantization(bits=4, group_size=32)

ROUTER_GAIN = 1.5
"""Standard deviation of the router's logits: spreads the sigmoid scores."""

SMALL_WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}

Entries = dict[str, list[Weight]]


def model_config(sizes: Sizes) -> ModelConfig:
    """Return K2's configuration with two layers, fewer experts and a smaller vocabulary."""
    config = replace(
        known_shape("kimi-k2").config,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        n_routed_experts=sizes.num_experts,
        vocab_size=VOCAB_SIZE,
        quantization=QUANTIZATION,
        quantization_overrides={},
        compression=None,
    )
    return config if sizes.has_k2_widths else replace(config, **SMALL_WIDTHS)


class RandomWeights:
    """Random weights, whose values are the same in every dtype. Floats are those of a bfloat16 checkpoint.

    Args:
        config: configuration of the model, from model_config.
        seed: seed of the values.
    """

    def __init__(self, config: ModelConfig, seed: int = 0):
        self.config = config
        self._random = np.random.default_rng(seed)
        self._layers = [self._layer(layer) for layer in range(config.num_hidden_layers)]
        self._top: Entries = {
            "model.embed_tokens": [self._matrix(config.vocab_size, config.hidden_size)],
            "model.norm": [self._norm(config.hidden_size)],
            "lm_head": [self._matrix(config.vocab_size, config.hidden_size)],
        }
        mx.eval([weight.arrays for entries in (*self._layers, self._top) for (weight,) in entries.values()])

    def model(self, dtype: mx.Dtype) -> Model:
        """Return the model that computes in `dtype`; the quantized matrices are shared by all models."""
        model = Model(self.config, self.top(dtype), self.layers(dtype))
        mx.eval(model.parameters())
        return model

    def top(self, dtype: mx.Dtype) -> LayerWeights:
        """Return the weights of the top."""
        return LayerWeights(_cast(self._top, dtype))

    def layers(self, dtype: mx.Dtype) -> list[LayerWeights]:
        """Return the weights of all layers."""
        num_shared = self.config.n_shared_experts
        return [
            LayerWeights(_cast(entries, dtype), latent_first=True, num_fused_shared=num_shared)
            for entries in self._layers
        ]

    def layer(self, index: int, dtype: mx.Dtype) -> LayerWeights:
        """Return the weights of one layer."""
        return LayerWeights(_cast(self._layers[index], dtype), latent_first=True)

    def _layer(self, layer: int) -> Entries:
        config = self.config
        hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        q_dim = config.q_lora_rank
        assert q_dim is not None
        entries: Entries = {
            "input_layernorm": [self._norm(hidden)],
            "post_attention_layernorm": [self._norm(hidden)],
            "self_attn.qkv_a_proj": [self._matrix(q_dim + latent + config.qk_rope_head_dim, hidden)],
            "self_attn.q_a_layernorm": [self._norm(q_dim)],
            "self_attn.q_b_proj": [self._matrix(heads * config.qk_head_dim, q_dim)],
            "self_attn.kv_a_layernorm": [self._norm(latent)],
            "self_attn.embed_q": [self._matrix(heads, latent, config.qk_nope_head_dim)],
            "self_attn.unembed_out": [self._matrix(heads, config.v_head_dim, latent)],
            "self_attn.o_proj": [self._matrix(hidden, heads * config.v_head_dim)],
        }
        if not config.is_moe_layer(layer):
            inner = config.intermediate_size
            return entries | {
                "mlp.gate_up_proj": [self._matrix(2 * inner, hidden)],
                "mlp.down_proj": [self._matrix(hidden, inner)],
            }
        inner, experts = config.moe_intermediate_size, config.n_routed_experts
        stack = experts + config.n_shared_experts
        router = self._normal(experts, hidden) * (ROUTER_GAIN * hidden**-0.5)
        return entries | {
            "mlp.gate": [Weight(router.astype(mx.bfloat16))],
            "mlp.gate.e_score_correction_bias": [Weight(0.1 * self._normal(experts))],
            "mlp.experts.gate_up_proj": [self._matrix(stack, 2 * inner, hidden)],
            "mlp.experts.down_proj": [self._matrix(stack, hidden, inner)],
        }

    def _normal(self, *shape: int) -> mx.array:
        return mx.array(self._random.standard_normal(shape, np.float32))

    def _bits(self, *shape: int) -> mx.array:
        return mx.array(np.frombuffer(self._random.bytes(4 * math.prod(shape)), np.uint32).reshape(shape))

    def _norm(self, width: int) -> Weight:
        return Weight((1 + 0.1 * self._normal(width)).astype(mx.bfloat16))

    def _matrix(self, *shape: int) -> Weight:
        """Return a quantized matrix whose outputs have about the size of its inputs; random bits, so no quantizing."""
        *stack, rows, columns = shape
        levels = 2**QUANTIZATION.bits
        packed = self._bits(*stack, rows, columns * QUANTIZATION.bits // 32)
        # The standard deviation of 0, 1, ..., n - 1 is sqrt((n * n - 1) / 12).
        step = (12 / (levels**2 - 1) / columns) ** 0.5
        spread = 1 + 0.2 * self._normal(*stack, rows, columns // QUANTIZATION.group_size)
        scales = (step * spread).astype(mx.bfloat16)
        biases = (scales * (-(levels - 1) / 2)).astype(mx.bfloat16)
        return Weight(packed, scales, biases, QUANTIZATION)


def _cast(entries: Entries, dtype: mx.Dtype) -> Entries:
    return {
        name: [make_weight(weight.arrays, weight.quantization, name, dtype) for weight in weights]
        for name, weights in entries.items()
    }


def random_tokens(count: int, vocab_size: int, seed: int = 1) -> mx.array:
    """Return tokens, (1, count)."""
    tokens = mx.random.randint(0, vocab_size, (1, count), key=mx.random.key(seed))
    mx.eval(tokens)
    return tokens


def filled_cache(model: Model, tokens: int, seed: int = 2) -> list[LatentCache]:
    """Return caches with random rows, as after a prompt of `tokens` tokens."""
    config = model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    dtype = model.layers[0]["input_layernorm"].dtype
    caches = model.make_cache()
    for index, cache in enumerate(caches):
        cache.append(mx.random.normal((1, 1, tokens, width), key=mx.random.key(seed + index)).astype(dtype))
    mx.eval([cache.state for cache in caches])
    return caches
