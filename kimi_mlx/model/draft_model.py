"""The draft model of speculative decoding: EAGLE-3 or 3.1 with latent attention.

It reads captured states: hidden states of some layers of the model, which EAGLE's papers call auxiliary hidden states.

Row i has the embedding of token i + 1 and the state of position i, is rotated to position i, and predicts token i + 2.
The state is `fuse` of the captured states of position i where the model has computed them. For later rows it is the
draft model's own output of row i - 1.

Letters: L rows of a step, M rows with outputs, C captured layers, T target_hidden_size, D hidden_size, V
draft_vocab_size.
Source: EAGLE-3 (https://arxiv.org/abs/2503.01840); order of the norms and residuals as in vLLM's and SGLang's models
for `Eagle3DeepseekV2ForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.model.attention import Attention
from kimi_mlx.model.attention_cost import AttentionCost
from kimi_mlx.model.batch_layout import BatchLayout
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import TUNINGS
from kimi_mlx.model.draft_config import DraftConfig
from kimi_mlx.model.moe import DenseMLP
from kimi_mlx.model.rope import Rope
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Embedding, Linear


class DraftModel(nn.Module):
    """A draft model. Only the leader has one.

    Args:
        config: dimensions of the draft model.
        weights: all entries of kimi_mlx.model.draft_names.draft_entries.
        captured_layers: layers of the model whose inputs it reads, for Model.capture.
        embedding: embedding of the model, used if the weights have none.
        token_ids: (V,) int32, the token of each drafted id, if the vocabulary is reduced; None if they are equal.
    """

    def __init__(
        self,
        config: DraftConfig,
        weights: LayerWeights,
        captured_layers: tuple[int, ...],
        embedding: Embedding | None = None,
        token_ids: mx.array | None = None,
    ):
        super().__init__()
        self.config, self.captured_layers = config, captured_layers
        self._rope = Rope(config)
        self._token_ids, self._embedding = token_ids, embedding  # underscores: these are not parameters
        if weights.has("embed_tokens"):
            self._embedding = self.embed_tokens = Embedding(weights.matrix("embed_tokens"))
        assert self._embedding is not None
        self.fc = Linear(weights.matrix("fc"))
        if config.fc_norm:
            self.fc_norm = mx.stack([weights.array(f"fc_norm.{i}") for i in range(config.num_captured)])  # (C, T)
        self.input_layernorm = weights.array("input_layernorm")
        self.hidden_norm = weights.array("hidden_norm")
        self.post_attention_layernorm = weights.array("post_attention_layernorm")
        self.self_attn = Attention(config, weights, layer=0)
        self._attention_cost = AttentionCost(self.self_attn.shape, TUNINGS[device_kind()])
        self.mlp = DenseMLP(weights, "mlp")
        self.norm = weights.array("norm")
        self.lm_head = Linear(weights.matrix("lm_head"))
        arrays = [self._rope.periods] if token_ids is None else [self._rope.periods, token_ids]
        mx.eval(self.parameters(), arrays)  # as in Model: they may be used in another thread

    def embed(self, tokens: mx.array) -> mx.array:
        """Return the embeddings of tokens of the whole vocabulary: (1, L) -> (1, L, D)."""
        assert self._embedding is not None
        return self._embedding(tokens)

    def fuse(self, captured: mx.array) -> mx.array:
        """Return the states for rows whose positions the model has computed: (1, L, C * T) -> (1, L, D)."""
        if "fc_norm" in self:
            B, L, width = captured.shape
            parts = captured.reshape(B, L, *self["fc_norm"].shape)
            parts = mx.fast.rms_norm(parts, None, self.config.rms_norm_eps) * self["fc_norm"]
            captured = parts.reshape(B, L, width)
        return self.fc(captured)

    def layout(self, lengths: Sequence[tuple[int, int]], positions: Sequence[int]) -> BatchLayout:
        """Return the layout of a step.

        Args:
            lengths: numbers of cached and new rows of each sequence; new may be 0.
            positions: positions of all new rows, ascending in each sequence. Rows of earlier positions may be missing
                in the cache.
        """
        return BatchLayout(self._rope, lengths, self._attention_cost, positions)

    def __call__(
        self,
        embeddings: mx.array,
        states: mx.array,
        caches: Sequence[LatentCache],
        layout: BatchLayout,
        num_outputs: Sequence[int] | None = None,
    ) -> mx.array:
        """Compute rows, and append them to the caches.

        Args:
            embeddings: (1, L, D), for row i that of token i + 1: `embed`, or a feature of an image.
            states: (1, L, D), from `fuse` or from an earlier call.
            caches: cache of each sequence.
            layout: layout of the L rows.
            num_outputs: number of final rows of each sequence whose outputs are computed, at least one in total; None
                for all.

        Returns:
            (1, M, D), the outputs: inputs of `logits`, and the states of the following rows.
        """
        eps = self.config.rms_norm_eps
        query_layout = layout if num_outputs is None else layout.query_layout(num_outputs)
        normed = mx.fast.rms_norm(states, self["hidden_norm"], eps)
        embeddings = mx.fast.rms_norm(embeddings, self["input_layernorm"], eps)
        residual = query_layout.select(normed if self.config.norm_before_residual else states)
        x = mx.concatenate([embeddings, normed], axis=-1)  # (1, L, 2 * D)
        x = residual + self.self_attn(x, caches, layout, query_layout, _check_nothing)
        x = self.mlp(mx.fast.rms_norm(x, self["post_attention_layernorm"], eps), x)
        return self._norm(x) if self.config.norm_output else x

    def logits(self, output: mx.array) -> mx.array:
        """Return the logits of the drafted ids: (1, M, D) -> (1, M, V)."""
        return self.lm_head(output if self.config.norm_output else self._norm(output))

    def to_token_ids(self, drafted: mx.array) -> mx.array:
        """Return the tokens of drafted ids below V, of any shape."""
        return drafted if self._token_ids is None else self._token_ids[drafted]

    def scatter(self, logits: mx.array) -> mx.array:
        """Return logits of all tokens, -inf for those that are not drafted: (..., V) -> (..., vocab_size)."""
        if self._token_ids is None:
            return logits
        full = mx.full((*logits.shape[:-1], self.config.vocab_size), -mx.inf, logits.dtype)
        full[..., self._token_ids] = logits
        return full

    def make_cache(self) -> LatentCache:
        """Return an empty cache for one sequence."""
        return LatentCache()

    def _norm(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self["norm"], self.config.rms_norm_eps)


def _check_nothing(name: str, x: mx.array) -> None:
    """Compare nothing: only one rank drafts."""
