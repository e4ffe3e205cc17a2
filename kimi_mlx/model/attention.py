"""Multi-head latent attention.

Letters: B batch, L length, D hidden_size, H num_attention_heads, N qk_nope_head_dim, P qk_rope_head_dim,
R kv_lora_rank, V v_head_dim, T tokens in the cache.
Source: DeepSeek-V2 (https://arxiv.org/abs/2405.04434) and DeepSeek-V3 (https://arxiv.org/abs/2412.19437) reports.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.model import numpy_attention
from kimi_mlx.model.attention_cost import AttentionShape
from kimi_mlx.model.batch_layout import BatchLayout, DecodeGroup, LatentRun, Segment
from kimi_mlx.model.blockwise import attend, attend_all, merge, softmax_state
from kimi_mlx.model.cache import LatentCache, append_together, fetch_together
from kimi_mlx.model.config import DecoderConfig
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import has_fused_attention, uses_numpy
from kimi_mlx.model.numpy_attention import LatentQueries
from kimi_mlx.model.sizes import SCORES_MAX, expanded_width, heads_at_once, latent_key_block
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Linear, Matrix, Weight, linear


class KeyProjection(Matrix):
    """W_UK, from the latent to the keys of each head; a stack of H matrices.

    Checkpoints store it as (H, R, N) (mlx-lm's `embed_q`) or, in `kv_b_proj`, as (H, N, R). It is quantized along its
    last dimension and cannot be transposed without loss, so both layouts are supported.
    """

    def __init__(self, source: Weight, latent_first: bool):
        super().__init__(source)
        self.latent_first = latent_first

    def absorb(self, q: mx.array) -> mx.array:
        """Project queries into the latent space: (B, H, L, N) -> (B, H, L, R)."""
        return self.matmul(q, transpose=self.latent_first)

    def expand(self, latent: mx.array, heads: slice | None = None) -> mx.array:
        """Expand latents into keys of all heads, or of some: (B, 1, T, R) -> (B, H, T, N)."""
        return self.matmul(latent, transpose=not self.latent_first, stack=heads)


class Attention(nn.Module):
    """MLA attention of one layer. A rank with some of the heads returns its partial sum."""

    def __init__(self, config: DecoderConfig, weights: LayerWeights, layer: int):
        super().__init__()
        self._keys_name, self._queries_name = f"cached keys of layer {layer}", f"compressed queries of layer {layer}"
        key = weights.matrix("self_attn.embed_q")
        self.num_heads = key.weight.shape[0]
        self.nope_dim, self.rope_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.latent_dim = config.kv_lora_rank
        self.shape = AttentionShape.of(config, self.num_heads)
        self.q_dim = config.q_lora_rank or self.num_heads * config.qk_head_dim
        self.scale, self.latent_eps = config.attention_scale, config.latent_norm_eps
        self.qkv_a_proj = linear(weights.matrices("self_attn.qkv_a_proj"))
        if config.q_lora_rank is not None:
            self.q_a_layernorm = weights.array("self_attn.q_a_layernorm")
            self.q_b_proj = Linear(weights.matrix("self_attn.q_b_proj"))
        self.kv_a_layernorm = weights.array("self_attn.kv_a_layernorm")
        self.embed_q = KeyProjection(key, latent_first=weights.latent_first)
        self.unembed_out = Matrix(weights.matrix("self_attn.unembed_out"))
        self.o_proj = Linear(weights.matrix("self_attn.o_proj"))

    def __call__(
        self,
        x: mx.array,
        caches: Sequence[LatentCache],
        layout: BatchLayout,
        query_layout: BatchLayout,
        check_same: Callable[[str, mx.array], None],
    ) -> mx.array:
        """Compute causal attention of each sequence over its cache and its new tokens.

        Args:
            x: (B, L, D).
            caches: cache of each sequence; all L tokens are appended.
            layout: layout of the L new tokens.
            query_layout: layout of the M tokens that are queries.
            check_same: function of a name and a value that every rank computes for itself; not of queries that the
                ranks divide.

        Returns:
            (B, M, D).
        """
        B, M = x.shape[0], query_layout.length
        q, kv = self._compress(x, layout, query_layout)
        latent, k_rope = kv[..., : self.latent_dim], kv[..., self.latent_dim :]
        if "q_b_proj" in self:
            q = mx.fast.rms_norm(q, self["q_a_layernorm"], self.latent_eps)
            if not query_layout.is_share:
                check_same(self._queries_name, q)
            q = self.q_b_proj(q)
        q = q.reshape(B, M, self.num_heads, self.nope_dim + self.rope_dim).swapaxes(1, 2)  # (B, H, M, N + P)
        q_nope, q_rope = q[..., : self.nope_dim], q[..., self.nope_dim :]
        q_rope = query_layout.rotate(q_rope)
        k_rope = layout.rotate(k_rope[:, None])  # (B, 1, L, P)
        latent = mx.fast.rms_norm(latent, self["kv_a_layernorm"], self.latent_eps)[:, None]  # (B, 1, L, R)
        rows = mx.concatenate([latent, k_rope], axis=-1)  # (B, 1, L, R + P)
        check_same(self._keys_name, rows)
        self._append(rows, caches, layout)
        out = self._attend(q_nope, q_rope, caches, query_layout)  # (B, H, M, V)
        return self.o_proj(out.swapaxes(1, 2).reshape(B, M, -1))

    def _append(self, rows: mx.array, caches: Sequence[LatentCache], layout: BatchLayout) -> None:
        """Append the rows (B, 1, L, R + P) of all new tokens to the caches of their sequences."""
        for group in layout.stacked_groups:
            members = [caches[index] for index in group.indices]
            new = rows[0, 0, group.start : group.stop].reshape(len(members), group.segment.length, -1)
            append_together(members, new, (group.order, group.positions))
        for index, segment in layout.separate_segments:
            caches[index].append(rows[:, :, segment.start : segment.stop])

    def _compress(self, x: mx.array, layout: BatchLayout, query_layout: BatchLayout) -> tuple[mx.array, mx.array]:
        """Return compressed queries (B, M, ...) and keys (B, L, R + P), before their norms."""
        if query_layout.length == layout.length:
            qkv = self.qkv_a_proj(x)
            return qkv[..., : self.q_dim], qkv[..., self.q_dim :]
        q = self.qkv_a_proj.some_rows(query_layout.select(x), 0, self.q_dim)
        return q, self.qkv_a_proj.some_rows(x, self.q_dim, self.q_dim + self.latent_dim + self.rope_dim)

    def _attend(
        self, q_nope: mx.array, q_rope: mx.array, caches: Sequence[LatentCache], layout: BatchLayout
    ) -> mx.array:
        """Attend, each segment to its own keys: (B, H, M, V)."""
        outs: list[mx.array] = []
        for run in layout.runs:
            if isinstance(run, LatentRun):
                outs.append(self._latent(q_nope, q_rope, caches, run))
            else:
                tokens = slice(run.segment.start, run.segment.stop)
                q = mx.concatenate([q_nope[:, :, tokens], q_rope[:, :, tokens]], axis=-1)
                outs.append(self._by_heads(q, caches[run.sequence].fetch(run.segment.total), run.segment))
        return _concatenate(outs)

    def _latent(self, q_nope: mx.array, q_rope: mx.array, caches: Sequence[LatentCache], run: LatentRun) -> mx.array:
        """Attend in the latent space, where the cache serves as keys and values of all heads: (B, H, M, V)."""
        tokens = slice(run.start, run.stop)
        q = mx.concatenate([self.embed_q.absorb(q_nope[:, :, tokens]), q_rope[:, :, tokens]], axis=-1)
        q = q.swapaxes(1, 2)  # (B, M, H, R + P)
        multiply_adds = q.shape[0] * run.num_pairs * self.shape.latent_pair
        if uses_numpy(device_kind(), sys.platform, q.itemsize, multiply_adds):
            parts = [
                LatentQueries(
                    segment.start - run.start, segment.stop - run.start, caches[index].fetch_own(segment.own.total)
                )
                for index, segment in run.segments
            ]
            out = numpy_attention.attend(q * self.scale, parts, self.latent_dim, self._shared_keys(caches, run))
        else:
            q = mx.contiguous(q) if run.stop > run.start + 1 else q  # so that the queries of a group are a slice
            if run.shared is None:
                out = _concatenate(
                    [
                        self.latent_group(q[:, group.start - run.start : group.stop - run.start], caches, group)
                        for group in run.groups
                    ],
                    axis=1,
                )
            else:
                out = self.latent_shared(q, caches, run)
        return self.unembed_out.matmul(out.swapaxes(1, 2))

    def latent_shared(self, q: mx.array, caches: Sequence[LatentCache], run: LatentRun) -> mx.array:
        """Attend in the latent space after a common prefix: to its rows with all queries at once, on any device.

        The sums over the prefix and those over the own rows of each sequence are merged. Temporary memory: as for one
        sequence with all queries, and the own rows of a group.

        Args:
            q: (1, M, H, R + P), queries of all sequences.
            caches: caches of all sequences.
            run: the sequences; they share rows.

        Returns:
            (1, M, H, R).
        """
        _, M, H, width = q.shape
        keys = self._shared_keys(caches, run)
        assert keys is not None
        scaled = q.reshape(1, 1, M * H, width) * self.scale
        prefix = attend_all(scaled, keys, self._latent_keys, latent_key_block(M * H))
        outs: list[mx.array] = []
        for group in run.groups:
            L, N, first = group.stop - group.start, len(group.indices), group.start - run.start
            before = prefix.rows(first * H, (first + L) * H)
            own = fetch_together([caches[index] for index in group.indices], group.total)  # (N, 1, T, R + P)
            if N == 1 < L and L * H * group.total > SCORES_MAX:
                queries, block = scaled[:, :, first * H : (first + L) * H], latent_key_block(L * H)
                out = attend(queries, own, self._latent_keys, group.segment.diagonal, H, block, before)
                outs.append(out.reshape(1, L, H, -1))
                continue
            queries = q[:, first : first + L].reshape(N, 1, -1, width)  # (N, 1, L / N * H, R + P)
            scores = mx.addmm(group.mask(H, q.dtype), queries, own.swapaxes(-1, -2), alpha=self.scale)
            sums = softmax_state(scores, own[..., : self.latent_dim])
            outs.append(merge(before.reshape(1, L, H), sums.reshape(1, L, H)).result(q.dtype))
        return _concatenate(outs, axis=1)

    def _shared_keys(self, caches: Sequence[LatentCache], run: LatentRun) -> mx.array | None:
        """Return the rows (1, 1, T, R + P) of this layer that the sequences of a run share, if any."""
        shared = caches[run.segments[0][0]].shared
        return None if shared is None else shared.keys

    def latent_group(self, q: mx.array, caches: Sequence[LatentCache], group: DecodeGroup) -> mx.array:
        """Attend in the latent space with the queries of a group, on any device.

        One sequence with more than SCORES_MAX scores attends over blocks of keys with a running softmax. Temporary
        memory: the scores of a block, at most SCORES_MAX, up to four times in float32; and for the L queries four
        times H * R values in float32.

        Args:
            q: (B, L, H, R + P), queries of all its sequences; B is 1 if there are several.
            caches: caches of all sequences.
            group: the N sequences.

        Returns:
            (B, L, H, R).
        """
        B, L, H, width = q.shape
        N = len(group.indices)
        keys = fetch_together([caches[index] for index in group.indices], group.total)  # (B * N, 1, T, R + P)
        if N == 1 < L and L * H * group.total > SCORES_MAX:
            q = q.reshape(B, 1, L * H, width) * self.scale
            mask, block = group.segment.diagonal, latent_key_block(L * H)
            return attend(q, keys, self._latent_keys, mask, H, block).reshape(B, L, H, -1)
        # addmm scales and masks within the one matrix product.
        scores = mx.addmm(
            group.mask(H, q.dtype), q.reshape(B * N, 1, -1, width), keys.swapaxes(-1, -2), alpha=self.scale
        )  # (B * N, 1, L / N * H, T)
        probabilities = mx.softmax(scores, axis=-1, precise=True)
        return (probabilities @ keys[..., : self.latent_dim]).reshape(B, L, H, -1)

    def _by_heads(self, q: mx.array, keys: mx.array, segment: Segment) -> mx.array:
        """Attend by heads. Neither all scores nor, in a long context, all keys are in memory at once.

        Args:
            q: (B, H, L, N + P), the queries of the segment.
            keys: (B, 1, T, R + P), its rows of the cache.
            segment: position of the queries.

        Returns:
            (B, H, L, V).
        """
        kind, v_dim = device_kind(), self.unembed_out.rows
        if has_fused_attention(kind, q.itemsize, q.shape[-1], v_dim, q.shape[2]):
            head_bytes = segment.total * expanded_width(self.nope_dim, self.rope_dim, v_dim) * q.itemsize
            return self.fused(q, keys, heads_at_once(q.shape[1], head_bytes))
        return self.blockwise(q, keys, segment)

    def blockwise(self, q: mx.array, keys: mx.array, segment: Segment) -> mx.array:
        """Attend by heads with blocks of keys, on any device.

        Args:
            q: (B, H, L, N + P), the queries of the segment.
            keys: (B, 1, T, R + P), its rows of the cache.
            segment: position of the queries.

        Returns:
            (B, H, L, V).
        """
        return attend(q * self.scale, keys, lambda rows: self._expand(*self._split(rows)), segment.diagonal)

    def fused(self, q: mx.array, keys: mx.array, at_once: int) -> mx.array:
        """Attend by heads with MLX's kernel, which does not store the scores where has_fused_attention is true.

        Args:
            q: (B, H, L, N + P), queries of the last L tokens.
            keys: (B, 1, T, R + P), rows of the cache.
            at_once: number of heads whose keys and values are in memory at once.

        Returns:
            (B, H, L, V).
        """
        H, q_dim, v_dim = q.shape[1], q.shape[-1], self.unembed_out.rows
        latent, k_rope = self._split(keys)
        outs: list[mx.array] = []
        for start in range(0, H, at_once):
            heads = slice(start, start + at_once)
            if outs:
                latent = mx.depends(latent, outs[-1])  # one group of heads after another
            k, v = self._expand(latent, k_rope, heads if at_once < H else None)
            v = mx.pad(v, [(0, 0), (0, 0), (0, 0), (0, q_dim - v_dim)])
            # On Metal, MLX would store the scores of heads wider than 128, because that is faster while they fit.
            is_forced = device_kind() == "metal"
            out = mx.fast.scaled_dot_product_attention(
                q[:, heads], k, v, scale=self.scale, mask="causal", force_fused=is_forced
            )
            outs.append(out[..., :v_dim])
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1)

    def _latent_keys(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Return keys (B, 1, T, R + P) and values (B, 1, T, R) in the latent space: the rows themselves."""
        return rows, rows[..., : self.latent_dim]

    def _split(self, keys: mx.array) -> tuple[mx.array, mx.array]:
        """Split rows of the cache into latents (B, 1, T, R) and rotated keys (B, 1, T, P).

        The latents are made contiguous: quantized_matmul copies an input with gaps between its rows, and does so after
        broadcasting it to all heads.
        """
        return mx.contiguous(keys[..., : self.latent_dim]), keys[..., self.latent_dim :]

    def _expand(self, latent: mx.array, k_rope: mx.array, heads: slice | None = None) -> tuple[mx.array, mx.array]:
        """Return keys (B, H, T, N + P) and values (B, H, T, V) of all heads, or of some."""
        k_nope = self.embed_q.expand(latent, heads)
        k_rope = mx.broadcast_to(k_rope, (*k_nope.shape[:3], self.rope_dim))
        return mx.concatenate([k_nope, k_rope], axis=-1), self.unembed_out.matmul(latent, stack=heads)


def _concatenate(parts: list[mx.array], axis: int = 2) -> mx.array:
    """Concatenate along `axis`, without a copy if there is one part."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=axis)
