"""Multi-head latent attention.

Letters: B batch, L length, D hidden_size, H num_attention_heads, N qk_nope_head_dim, P qk_rope_head_dim,
R kv_lora_rank, V v_head_dim, T tokens in the cache.
Source: DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and DeepSeek-V3 (https://arxiv.org/abs/2412.19437) reports.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.model.blockwise import attend
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.config import NORM_EPS_LATENT, ModelConfig
from kimi_mlx.model.rope import is_gpu
from kimi_mlx.model.sizes import expanded_width, heads_at_once
from kimi_mlx.model.step import Step
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

    def expand(self, latent: mx.array, heads: slice | None = None) -> mx.array:
        """Latents into keys, of all heads or of some: (B, 1, T, R) -> (B, H, T, N)."""
        return self.matmul(latent, transpose=not self.latent_first, stack=heads)


class Attention(nn.Module):
    """One layer's attention over a LatentCache; with some of the heads, that rank's part of the sum over all."""

    def __init__(self, config: ModelConfig, weights: LayerWeights):
        super().__init__()
        key = weights.matrix("self_attn.embed_q")
        self.num_heads = key.weight.shape[0]
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_dim = config.kv_lora_rank
        self.q_dim = config.q_lora_rank or self.num_heads * config.qk_head_dim
        self.scale = config.attention_scale
        self.qkv_a_proj = linear(weights.matrices("self_attn.qkv_a_proj"))
        if config.q_lora_rank is not None:
            self.q_a_layernorm = weights.array("self_attn.q_a_layernorm")
            self.q_b_proj = Linear(weights.matrix("self_attn.q_b_proj"))
        self.kv_a_layernorm = weights.array("self_attn.kv_a_layernorm")
        self.embed_q = KeyProjection(key, latent_first=weights.latent_first)
        self.unembed_out = Matrix(weights.matrix("self_attn.unembed_out"))
        self.o_proj = Linear(weights.matrix("self_attn.o_proj"))

    def __call__(self, x: mx.array, cache: LatentCache, step: Step, last: int | None = None) -> mx.array:
        """Attention, causal after the tokens already in the cache.

        Args:
            x: (B, L, D).
            cache: gets all L tokens.
            step: of these L tokens after those in the cache.
            last: how many of the L tokens ask, the last M; all if None.

        Returns:
            (B, M, D).
        """
        B, L, _ = x.shape
        asking = step if last is None else step.last(last)
        M = asking.length
        qkv = self.qkv_a_proj(x)
        q = qkv[:, L - M :, : self.q_dim]
        latent = qkv[..., self.q_dim : self.q_dim + self.latent_dim]
        k_rope = qkv[..., self.q_dim + self.latent_dim :]
        if "q_b_proj" in self:
            q = self.q_b_proj(mx.fast.rms_norm(q, self["q_a_layernorm"], NORM_EPS_LATENT))
        q = q.reshape(B, M, self.num_heads, self.nope_dim + self.rope_dim).swapaxes(1, 2)  # (B, H, M, N + P)
        q_nope, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
        q_rope = asking.rotate(q_rope)
        k_rope = step.rotate(k_rope[:, None])  # (B, 1, L, P)
        latent = mx.fast.rms_norm(latent, self["kv_a_layernorm"], NORM_EPS_LATENT)[:, None]  # (B, 1, L, R)
        keys = cache.update_and_fetch(mx.concatenate([latent, k_rope], axis=-1))  # (B, 1, T, R + P)
        if M <= ABSORB_MAX_LENGTH:
            out = self._absorbed(q_nope, q_rope, keys, asking)
        else:
            out = self._expanded(q_nope, q_rope, keys, asking)  # (B, H, M, V)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, M, -1))

    def _absorbed(self, q_nope: mx.array, q_rope: mx.array, keys: mx.array, step: Step) -> mx.array:
        """Attention in the latent space, for a few queries: the cache itself is key and value."""
        B, H, L, _ = q_nope.shape
        q = mx.concatenate([self.embed_q.absorb(q_nope), q_rope], axis=-1)  # (B, H, L, R + P)
        q = q.reshape(B, 1, H * L, -1)
        # addmm scales and masks within the one matrix product.
        scores = mx.addmm(step.mask(H, q.dtype), q, keys.swapaxes(-1, -2), alpha=self.scale)  # (B, 1, H * L, T)
        probabilities = mx.softmax(scores, axis=-1, precise=True)
        out = probabilities @ keys[..., : self.latent_dim]  # (B, 1, H * L, R)
        return self.unembed_out.matmul(out.reshape(B, H, L, -1))

    def _expanded(self, q_nope: mx.array, q_rope: mx.array, keys: mx.array, step: Step) -> mx.array:
        """Attention by heads, for prefill; neither all scores nor, in a long context, all keys are ever there."""
        q = mx.concatenate([q_nope, q_rope], axis=-1)
        if is_fused(q.shape[-1], self.unembed_out.rows):
            return self._fused(q, keys)
        return attend(q * self.scale, keys, self._expand, step.diagonal)

    def _fused(self, q: mx.array, keys: mx.array) -> mx.array:
        """One kernel that never stores the scores, with the keys of as many heads at once as fit."""
        H, T, q_dim, v_dim = q.shape[1], keys.shape[2], q.shape[-1], self.unembed_out.rows
        at_once = heads_at_once(H, T * expanded_width(self.nope_dim, self.rope_dim, v_dim) * q.itemsize)
        outs: list[mx.array] = []
        for start in range(0, H, at_once):
            heads = slice(start, start + at_once)
            if outs:
                keys = mx.depends(keys, outs[-1])  # one group of heads after the other
            k, v = self._expand(keys, heads if at_once < H else None)
            v = mx.pad(v, [(0, 0), (0, 0), (0, 0), (0, q_dim - v_dim)])
            out = mx.fast.scaled_dot_product_attention(
                q[:, heads], k, v, scale=self.scale, mask="causal", force_fused=is_gpu()
            )
            outs.append(out[..., :v_dim])
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1)

    def _expand(self, keys: mx.array, heads: slice | None = None) -> tuple[mx.array, mx.array]:
        """Keys (B, H, T, N + P) and values (B, H, T, V) of all heads, or of some."""
        latent, k_rope = keys[..., : self.latent_dim], keys[..., self.latent_dim :]
        k_nope = self.embed_q.expand(latent, heads)
        k_rope = mx.broadcast_to(k_rope, (*k_nope.shape[:3], self.rope_dim))
        return mx.concatenate([k_nope, k_rope], axis=-1), self.unembed_out.matmul(latent, stack=heads)


def is_fused(q_dim: int, v_dim: int) -> bool:
    """Whether MLX has a kernel for these head widths that never stores the scores."""
    return is_gpu() and q_dim in FUSED_HEAD_DIMS and v_dim <= q_dim
