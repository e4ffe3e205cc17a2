"""The decoder: embedding, layers, head.

Letters: B batch, L length, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Part:
    """What a step has of one sequence.

    Args:
        cache: of each layer, from make_cache.
        length: new tokens, at least one.
        last: of how many of them, at the end, logits will be asked; 0 if only the cache is wanted.
    """

    cache: list[LatentCache]
    length: int
    last: int = 1


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

    def hand_on(self, hidden: mx.array, tokens: mx.array, asked: int) -> mx.array:
        """Give states to the rank with the layers behind ours; see Model.hidden.

        Args:
            hidden: (B, L, D), or of the asked ones alone if nobody has layers behind ours.
            tokens: (B, L), whose states they are.
            asked: of how many logits will be asked.
        """
        return hidden[:, :asked]

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

    def __call__(self, x: mx.array, caches: Sequence[LatentCache], step: Step, asking: Step) -> mx.array:
        """(B, L, D) -> (B, M, D), the states of the M tokens that ask; all L are in the caches then."""
        attended = self.self_attn(mx.fast.rms_norm(x, self["input_layernorm"], self.eps), caches, step, asking)
        x = self._exchange.add_attention(asking.pick(x), attended)
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
        length = tokens.shape[1]
        hidden = self.hidden(tokens, [Part(cache or self.make_cache(), length, length)])
        return self.logits(hidden) if self.has_head else hidden

    def hidden(self, tokens: mx.array, parts: Sequence[Part]) -> mx.array:
        """States before the last norm: (B, L) -> (B, M, D); extends the caches.

        Args:
            tokens: (B, L) integers, those of each part behind those of the one before; in a pipeline only rank 0
                looks at them. B is 1 if there are several parts.
            parts: the sequences whose tokens they are; the last layer computes only the M states that are asked for.

        Returns:
            What `logits` takes. On the ranks of a pipeline it is what they hand on, to be evaluated by all of them.
        """
        x = self.embed_tokens(tokens) if "embed_tokens" in self else self.exchange.receive(tokens)
        step = Step(self._rope, [(part.cache[0].offset, part.length) for part in parts])
        caches = list(zip(*(part.cache for part in parts), strict=True))
        for layer, layer_caches in zip(self.layers[:-1], caches[:-1], strict=True):
            x = layer(x, layer_caches, step, step)
        asked = [part.last for part in parts]
        num_asked = sum(asked)
        asking = step if self.exchange.is_passed_on else step.last(asked if num_asked else [1, *asked[1:]])
        return self.exchange.hand_on(self.layers[-1](x, caches[-1], step, asking), tokens, num_asked)

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, M, D) -> (B, M, vocab_size), in the order of the calls of `hidden`."""
        h = mx.fast.rms_norm(self.exchange.take_back(hidden), self["norm"], self.config.rms_norm_eps)
        return self.exchange.gather_vocabulary(self.lm_head(h))

    def make_cache(self) -> list[LatentCache]:
        """An empty cache for one batch of sequences."""
        return [LatentCache() for _ in self.layers]
