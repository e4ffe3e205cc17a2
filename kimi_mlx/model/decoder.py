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

    kimi_mlx.parallel has those for several ranks.
    """

    adds_residual = True
    """Whether this rank's part of a sum over the experts carries the residual: true for exactly one rank."""

    is_passed_on = False
    """Whether another rank has layers behind ours, and needs the states of all tokens."""

    def add_attention(self, x: mx.array, part: mx.array) -> mx.array:
        """x + the sum of all ranks' parts of the attention, the same bits on each rank."""
        return x + part

    def sum_experts(self, part: mx.array) -> mx.array:
        """Sum of all ranks' parts, the same bits on each rank."""
        return part

    def receive(self, tokens: mx.array) -> mx.array:
        """The states (B, L, D) of tokens (B, L), from the rank with the layers before ours."""
        raise NotImplementedError("only a rank without the embedding receives states")

    def hand_on(self, hidden: mx.array, tokens: mx.array, last: int) -> mx.array:
        """Give states (B, L, D) to the rank with the layers behind ours; see Model.hidden."""
        return hidden[:, hidden.shape[1] - last :]

    def take_back(self, hidden: mx.array) -> mx.array:
        """The states that hand_on has promised: those behind the last layer."""
        return hidden

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
        x = self._exchange.add_attention(x if last is None else x[:, -last:], attended)
        h = mx.fast.rms_norm(x, self["post_attention_layernorm"], self.eps)
        residual = x if self._exchange.adds_residual else None
        return self._exchange.sum_experts(self.mlp(h, residual))


class Model(nn.Module):
    """A Kimi of the K2 family (or Moonlight), or one rank's share of it.

    Args:
        config: its dimensions.
        top: the entries `model.embed_tokens`, `model.norm`, `lm_head`, as far as they are held.
        layers: the entries of each layer; none of a layer that is not held.
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
        if top.has("model.embed_tokens"):
            self.embed_tokens = Embedding(top.matrix("model.embed_tokens"))
        self.layers = [
            DecoderLayer(config, index, weights, self.exchange)
            for index, weights in enumerate(layers)
            if weights.entries
        ]
        if top.has("lm_head"):
            self.norm = top.array("model.norm")
            self.lm_head = Linear(top.matrix("lm_head"))

    @property
    def has_head(self) -> bool:
        """Whether this rank computes logits; the others of a pipeline only hand states on."""
        return "lm_head" in self

    def __call__(self, tokens: mx.array, cache: list[LatentCache] | None = None) -> mx.array:
        """Logits of every position.

        Args:
            tokens: (batch, length) integers below vocab_size.
            cache: from make_cache, extended by the call; none starts afresh.

        Returns:
            (batch, length, vocab_size) in the compute dtype; on the ranks of a pipeline without the head what they
            hand on, to be evaluated by them.
        """
        hidden = self.hidden(tokens, cache or self.make_cache(), last=tokens.shape[1])
        return self.logits(hidden) if self.has_head else hidden

    def hidden(self, tokens: mx.array, cache: list[LatentCache], last: int = 1) -> mx.array:
        """States before the last norm: (B, L) -> (B, last, D); extends the cache.

        Args:
            tokens: (B, L) integers; in a pipeline only rank 0 looks at them.
            cache: from make_cache.
            last: of how many positions at the end logits will be asked, the last layer computes no others; 0 if only
                the cache is wanted.

        Returns:
            What `logits` takes. On the ranks of a pipeline it is what they hand on, to be evaluated by all of them.
        """
        x = self.embed_tokens(tokens) if "embed_tokens" in self else self.exchange.receive(tokens)
        step = Step(self._rope, cache[0].offset, tokens.shape[1])
        for layer, layer_cache in zip(self.layers[:-1], cache[:-1], strict=True):
            x = layer(x, layer_cache, step)
        x = self.layers[-1](x, cache[-1], step, None if self.exchange.is_passed_on else max(last, 1))
        return self.exchange.hand_on(x, tokens, last)

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, last, D) -> (B, last, vocab_size), in the order of the calls of `hidden`."""
        h = mx.fast.rms_norm(self.exchange.take_back(hidden), self["norm"], self.config.rms_norm_eps)
        return self.exchange.gather_vocabulary(self.lm_head(h))

    def make_cache(self) -> list[LatentCache]:
        """An empty cache for one batch of sequences."""
        return [LatentCache() for _ in self.layers]
