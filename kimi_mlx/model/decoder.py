"""The decoder: embedding, layers, head.

Letters: B batch, L length, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.model.attention import Attention
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.moe import DenseMLP, MoE
from kimi_mlx.model.rope import Rope
from kimi_mlx.model.step import Step
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Embedding, Linear


class Exchange:
    """What a model that holds only a share of the weights asks of its peers; this one has none.

    kimi_mlx.parallel has the one for several ranks.
    """

    adds_residual = True
    """Whether this rank's part of a sum carries the residual: true for exactly one rank."""

    def sum(self, x: mx.array) -> mx.array:
        """Sum of all ranks' x, the same bits on each rank."""
        return x

    def gather_vocabulary(self, logits: mx.array) -> mx.array:
        """Join the ranks' parts of the last dimension: (..., rows here) -> (..., vocab_size)."""
        return logits


class DecoderLayer(nn.Module):
    """Attention and experts (or a dense MLP), each after a norm and with a residual."""

    def __init__(self, config: ModelConfig, layer: int, weights: LayerWeights, exchange: Exchange):
        super().__init__()
        self.eps = config.rms_norm_eps
        self._exchange = exchange
        self.input_layernorm = weights.array("input_layernorm")
        self.post_attention_layernorm = weights.array("post_attention_layernorm")
        self.self_attn = Attention(config, weights)
        self.mlp = MoE(config, weights) if config.is_moe_layer(layer) else DenseMLP(weights, "mlp")

    def __call__(self, x: mx.array, cache: LatentCache, step: Step, last: int | None = None) -> mx.array:
        """(B, L, D) -> (B, L, D), or (B, last, D) for the last tokens alone; all L are in the cache then."""
        attended = self.self_attn(mx.fast.rms_norm(x, self["input_layernorm"], self.eps), cache, step, last)
        x = attended + (x if last is None else x[:, -last:])
        h = mx.fast.rms_norm(x, self["post_attention_layernorm"], self.eps)
        residual = x if self._exchange.adds_residual else None
        return self._exchange.sum(self.mlp(h, residual))


class Model(nn.Module):
    """A Kimi of the K2 family (or Moonlight), or one rank's share of it.

    Args:
        config: its dimensions.
        top: the entries `model.embed_tokens`, `model.norm`, `lm_head`.
        layers: the entries of each layer.
        exchange: how to add and gather over the ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        top: LayerWeights,
        layers: Sequence[LayerWeights],
        exchange: Exchange | None = None,
    ):
        super().__init__()
        self.config = config
        self.exchange = exchange or Exchange()
        self._rope = Rope(config)
        self.embed_tokens = Embedding(top.matrix("model.embed_tokens"))
        self.layers = [DecoderLayer(config, index, weights, self.exchange) for index, weights in enumerate(layers)]
        self.norm = top.array("model.norm")
        self.lm_head = Linear(top.matrix("lm_head"))

    def __call__(self, tokens: mx.array, cache: list[LatentCache] | None = None) -> mx.array:
        """Logits of every position.

        Args:
            tokens: (batch, length) integers below vocab_size.
            cache: from make_cache, extended by the call; none starts afresh.

        Returns:
            (batch, length, vocab_size) in the compute dtype.
        """
        return self.logits(self.hidden(tokens, cache or self.make_cache()))

    def hidden(self, tokens: mx.array, cache: list[LatentCache], last: int | None = None) -> mx.array:
        """States before the last norm; extends the cache.

        Args:
            tokens: (B, L) integers.
            cache: of the tokens before.
            last: how many of the states are wanted; the last layer computes no others. None: all.

        Returns:
            (B, L, D), or (B, last, D).
        """
        x = self.embed_tokens(tokens)
        step = Step(self._rope, cache[0].offset, tokens.shape[1])
        for layer, layer_cache in zip(self.layers[:-1], cache[:-1], strict=True):
            x = layer(x, layer_cache, step)
        return self.layers[-1](x, cache[-1], step, last)

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., D) -> (..., vocab_size)."""
        h = mx.fast.rms_norm(hidden, self["norm"], self.config.rms_norm_eps)
        return self.exchange.gather_vocabulary(self.lm_head(h))

    def make_cache(self) -> list[LatentCache]:
        """An empty cache for one batch of sequences."""
        return [LatentCache() for _ in self.layers]
