"""Multi-head latent attention.

Letters: B batch, L length, D hidden_size, H num_attention_heads, N qk_nope_head_dim, P qk_rope_head_dim,
R kv_lora_rank, V v_head_dim, T tokens in the cache.
Source: DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and DeepSeek-V3 (https://arxiv.org/abs/2412.19437) reports.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.config import NORM_EPS_LATENT, ModelConfig
from kimi_mlx.model.rope import Rope
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Linear, Matrix, Weight, linear

ABSORB_MAX_LENGTH = 8
"""Up to this many new tokens attend in the latent space: cheaper than expanding T cached tokens into heads."""

FUSED_HEAD_DIMS = frozenset({64, 72, 80, 96, 128, 192, 256})
"""Head widths for which MLX's Metal attention never writes the scores (queries and values of equal width)."""


class KeyProjection(Matrix):
    """W_UK, from the latent to the keys of each head; a stack of H matrices.

    Checkpoints have it as (H, R, N) (mlx-lm's `embed_q`) or, in `kv_b_proj`, as (H, N, R). Quantized along
    its last dimension it cannot be transposed without loss, so both are used as they are.
    """

    def __init__(self, source: Weight, latent_first: bool):
        super().__init__(source)
        self.latent_first = latent_first

    def absorb(self, q: mx.array) -> mx.array:
        """Queries into the latent space: (B, H, L, N) -> (B, H, L, R)."""
        return self.matmul(q, transpose=self.latent_first)

    def expand(self, latent: mx.array) -> mx.array:
        """Latents into keys: (B, 1, T, R) -> (B, H, T, N)."""
        return self.matmul(latent, transpose=not self.latent_first)


class Attention(nn.Module):
    """One layer's attention over a LatentCache; with some of the heads, that rank's part of the sum over all."""

    def __init__(self, config: ModelConfig, weights: LayerWeights, rope: Rope):
        super().__init__()
        key = weights.matrix("self_attn.embed_q")
        self.num_heads = key.weight.shape[0]
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_dim = config.kv_lora_rank
        self.q_dim = config.q_lora_rank or self.num_heads * config.qk_head_dim
        self.scale = config.attention_scale
        self._rope = rope
        self._no_mask = mx.zeros((1,), weights.array("self_attn.kv_a_layernorm").dtype)
        mx.eval(self._no_mask)  # a constant: not to be made anew in every step
        self.qkv_a_proj = linear(weights.matrices("self_attn.qkv_a_proj"))
        if config.q_lora_rank is not None:
            self.q_a_layernorm = weights.array("self_attn.q_a_layernorm")
            self.q_b_proj = Linear(weights.matrix("self_attn.q_b_proj"))
        self.kv_a_layernorm = weights.array("self_attn.kv_a_layernorm")
        self.embed_q = KeyProjection(key, latent_first=weights.latent_first)
        self.unembed_out = Matrix(weights.matrix("self_attn.unembed_out"))
        self.o_proj = Linear(weights.matrix("self_attn.o_proj"))

    def __call__(self, x: mx.array, cache: LatentCache) -> mx.array:
        """(B, L, D) -> (B, L, D), causal after the tokens already in the cache."""
        B, L, _ = x.shape
        qkv = self.qkv_a_proj(x)
        q = qkv[..., : self.q_dim]
        latent = qkv[..., self.q_dim : self.q_dim + self.latent_dim]
        k_rope = qkv[..., self.q_dim + self.latent_dim :]
        if "q_b_proj" in self:
            q = self.q_b_proj(mx.fast.rms_norm(q, self["q_a_layernorm"], NORM_EPS_LATENT))
        q = q.reshape(B, L, self.num_heads, self.nope_dim + self.rope_dim).swapaxes(1, 2)  # (B, H, L, N + P)
        q_nope, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
        q_rope = self._rope(q_rope, cache.offset)
        k_rope = self._rope(k_rope[:, None], cache.offset)  # (B, 1, L, P)
        latent = mx.fast.rms_norm(latent, self["kv_a_layernorm"], NORM_EPS_LATENT)[:, None]  # (B, 1, L, R)
        keys = cache.update_and_fetch(mx.concatenate([latent, k_rope], axis=-1))  # (B, 1, T, R + P)
        attend = self._absorbed if L <= ABSORB_MAX_LENGTH else self._expanded
        out = attend(q_nope, q_rope, keys)  # (B, H, L, V)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, L, -1))

    def _absorbed(self, q_nope: mx.array, q_rope: mx.array, keys: mx.array) -> mx.array:
        """Attention in the latent space, for a few queries: the cache itself is key and value."""
        B, H, L, _ = q_nope.shape
        T = keys.shape[2]
        q = mx.concatenate([self.embed_q.absorb(q_nope), q_rope], axis=-1)  # (B, H, L, R + P)
        q = q.reshape(B, 1, H * L, -1)
        # addmm scales and masks within the one matrix product.
        mask = self._no_mask if L == 1 else mx.tile(causal_mask(L, T, q.dtype), (H, 1))
        scores = mx.addmm(mask, q, keys.swapaxes(-1, -2), alpha=self.scale)  # (B, 1, H * L, T)
        probabilities = mx.softmax(scores, axis=-1, precise=True)
        out = probabilities @ keys[..., : self.latent_dim]  # (B, 1, H * L, R)
        return self.unembed_out.matmul(out.reshape(B, H, L, -1))

    def _expanded(self, q_nope: mx.array, q_rope: mx.array, keys: mx.array) -> mx.array:
        """Attention by heads, for prefill: where a fused kernel exists, the scores are never stored."""
        B, H, _, _ = q_nope.shape
        latent, k_rope = keys[..., : self.latent_dim], keys[..., self.latent_dim :]
        k_rope = mx.broadcast_to(k_rope, (B, H, *k_rope.shape[2:]))
        k = mx.concatenate([self.embed_q.expand(latent), k_rope], axis=-1)  # (B, H, T, N + P)
        v = self.unembed_out.matmul(latent)  # (B, H, T, V)
        q = mx.concatenate([q_nope, q_rope], axis=-1)
        v_dim, q_dim = v.shape[-1], q.shape[-1]
        is_fused = mx.default_device().type == mx.DeviceType.gpu and q_dim in FUSED_HEAD_DIMS and v_dim <= q_dim
        if is_fused and v_dim < q_dim:
            v = mx.pad(v, [(0, 0), (0, 0), (0, 0), (0, q_dim - v_dim)])
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask="causal", force_fused=is_fused)
        return out[..., :v_dim]


def causal_mask(length: int, total: int, dtype: mx.Dtype) -> mx.array:
    """Additive mask (length, total): query i, the one at total - length + i, sees the keys up to itself."""
    visible = mx.arange(total)[None] <= mx.arange(total - length, total)[:, None]
    return mx.where(visible, mx.array(0.0, dtype), mx.array(-mx.inf, dtype))
