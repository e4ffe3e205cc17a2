"""The decoder: embedding, layers, head.

Letters: B batch, L length, D hidden_size.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.errors import VisionError
from kimi_mlx.model.attention import Attention
from kimi_mlx.model.attention_cost import AttentionCost, AttentionShape
from kimi_mlx.model.batch_layout import BatchLayout
from kimi_mlx.model.cache import LatentCache
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import TUNINGS, Tuning
from kimi_mlx.model.expert_stats import ExpertStats
from kimi_mlx.model.expert_streamer import ExpertStreamer
from kimi_mlx.model.image_rows import ImageRows, place_features, replace_rows
from kimi_mlx.model.moe import DenseMLP, MoE
from kimi_mlx.model.rope import Rope
from kimi_mlx.model.streamed_moe import StreamedMoE
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.vision import VisionTower
from kimi_mlx.model.weight import Embedding, Linear


@dataclass(frozen=True)
class SequenceSlice:
    """The tokens of one sequence in a step.

    Args:
        cache: caches of the layers, from make_cache.
        length: number of new tokens, at least one.
        num_logits: number of final positions that need logits; 0 only fills the cache.
    """

    cache: list[LatentCache]
    length: int
    num_logits: int = 1


class CapturedStates:
    """The captured states of one call of Model.hidden: inputs of some layers, of all L tokens.

    In a pipeline the last rank sends most of them back. Do not use those of a step without logits before the next step
    was launched, or the ranks wait for each other; and use or `receive` those of every step.

    Args:
        parts: (B, L, D) of each captured layer of this rank, in the order of the layers.
    """

    def __init__(self, parts: Sequence[mx.array]):
        self._parts = parts

    def receive(self) -> None:
        """Start to receive the states of other ranks, if there are any. Does not wait for them."""

    def array(self) -> mx.array:
        """Return the states side by side, (B, L, layers * D). Waits on the CPU for those of a late rank.

        Raises:
            RingError: a rank is lost.
        """
        return mx.concatenate(list(self._parts), axis=-1)


class Communicator:
    """Communication of a rank with the others; this one is for a single rank.

    kimi_mlx.parallel has communicators for several ranks.
    """

    owns_residual = True
    """Whether this rank adds the residual to its partial sum of the experts: true for exactly one rank."""

    has_next_stage = False
    """Whether another rank has the next layers and needs the hidden states of all tokens."""

    def divide_queries(self, layout: BatchLayout) -> None:
        """Divide the queries of a layout over the ranks if that saves time; the same decision on all ranks."""

    def gather_queries(self, attended: mx.array, bounds: Sequence[int]) -> mx.array:
        """Concatenate the attention outputs of all ranks' queries: (B, own queries, D) -> (B, M, D).

        Args:
            attended: outputs of this rank's queries.
            bounds: bounds of the queries of each rank.
        """
        return attended

    def add_attention(self, x: mx.array, partial: mx.array) -> mx.array:
        """Return x + the sum of all ranks' partial attention outputs, the same bits on each rank."""
        return x + partial

    def check_same(self, name: str, x: mx.array, is_set: bool = False) -> None:
        """Compare a value that every rank computes for itself with those of the other ranks, if this step is checked.

        Args:
            name: plural name of the value, for error messages.
            x: the value.
            is_set: whether the order in the last dimension does not matter.
        """

    def sum_experts(self, partial: mx.array) -> mx.array:
        """Return the sum of all ranks' partial expert outputs, the same bits on each rank."""
        return partial

    def recv_from_previous_stage(self, tokens: mx.array) -> mx.array:
        """Receive the hidden states (B, L, D) of tokens (B, L) from the rank with the previous layers."""
        raise NotImplementedError("only a rank without the embedding receives hidden states")

    def send_to_next_stage(self, hidden: mx.array, tokens: mx.array, num_logits: int) -> mx.array:
        """Send hidden states to the rank with the next layers; see Model.hidden.

        Args:
            hidden: (B, L, D), or (B, num_logits, D) if there is no next stage.
            tokens: (B, L), tokens of these hidden states.
            num_logits: number of logits that will be computed.
        """
        return hidden[:, :num_logits]

    def set_captured_layers(self, layers: Collection[int]) -> None:
        """Set the layers whose inputs are captured from the next step on, the same on all ranks."""

    def capture(self, states: Sequence[mx.array]) -> CapturedStates | None:
        """Return the captured states of all ranks in the step that is sent next, on the leader.

        Args:
            states: (B, L, D), inputs of the captured layers of this rank.
        """
        return CapturedStates(states)

    def recv_last_hidden(self, hidden: mx.array) -> mx.array:
        """Return the output of the last layer for what send_to_next_stage returned."""
        return hidden

    def gather_logits(self, logits: mx.array) -> mx.array:
        """Concatenate the ranks' shares of the last dimension: (..., rows here) -> (..., vocab_size)."""
        return logits


class DecoderLayer(nn.Module):
    """Attention and experts (or a dense MLP), each after a norm and with a residual."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        weights: LayerWeights,
        communicator: Communicator,
        streamer: ExpertStreamer | None = None,
    ):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.communicator = communicator
        self._states_name, self._experts_name = f"hidden states in layer {layer}", f"chosen experts of layer {layer}"
        self._scores_name = f"scores of chosen experts of layer {layer}"
        self.input_layernorm = weights.array("input_layernorm")
        self.post_attention_layernorm = weights.array("post_attention_layernorm")
        self.self_attn = Attention(config, weights, layer)
        if not config.is_moe_layer(layer):
            self.mlp = DenseMLP(weights, "mlp")
        elif streamer is None or weights.routed is None:
            self.mlp = MoE(config, weights)
        else:
            self.mlp = StreamedMoE(config, weights, streamer, layer)

    def __call__(
        self, x: mx.array, caches: Sequence[LatentCache], layout: BatchLayout, query_layout: BatchLayout
    ) -> mx.array:
        """(B, L, D) -> (B, M, D), the hidden states of the M queries. The caches get all L tokens."""
        communicator = self.communicator
        h = mx.fast.rms_norm(x, self["input_layernorm"], self.eps)
        share = query_layout.share
        own_layout = query_layout if share is None else share.layout
        attended = self.self_attn(h, caches, layout, own_layout, communicator.check_same)
        if share is not None:
            attended = communicator.gather_queries(attended, share.bounds)
        x = communicator.add_attention(query_layout.select(x), attended)
        h = mx.fast.rms_norm(x, self["post_attention_layernorm"], self.eps)
        communicator.check_same(self._states_name, h)
        residual = x if communicator.owns_residual else None
        if not isinstance(self.mlp, MoE):
            return communicator.sum_experts(self.mlp(h, residual))
        ids, scores = self.mlp.gate(h)
        communicator.check_same(self._experts_name, ids, is_set=True)
        communicator.check_same(self._scores_name, scores, is_set=True)
        if isinstance(self.mlp, StreamedMoE):
            return communicator.sum_experts(self.mlp.stream(h, residual, ids, scores))
        return communicator.sum_experts(self.mlp(h, residual, ids, scores))


class Model(nn.Module):
    """A model of the Kimi K2 family (or Moonlight), or one rank's share of it.

    Args:
        config: the model's dimensions.
        top: entries `model.embed_tokens`, `model.norm` and `lm_head`, if the rank holds them.
        layers: entries of each layer; empty for a layer that the rank does not hold.
        communicator: communicator to the other ranks; None for a single rank.
        vision: vision tower, if the rank holds it.
        streamer: streamer of the routed experts that are not in the entries; None if all are.
    """

    def __init__(
        self,
        config: ModelConfig,
        top: LayerWeights,
        layers: Sequence[LayerWeights],
        communicator: Communicator | None = None,
        vision: VisionTower | None = None,
        streamer: ExpertStreamer | None = None,
    ):
        super().__init__()
        self.vision = vision
        self.config = config
        self.communicator = communicator or Communicator()
        self.captured: CapturedStates | None = None
        self.streamer = streamer
        self._rope = Rope(config)
        self._captured_layers: frozenset[int] = frozenset()
        self._first_layer = next((index for index, weights in enumerate(layers) if weights.entries), 0)
        if top.has("model.embed_tokens"):
            self.embed_tokens = Embedding(top.matrix("model.embed_tokens"))
        self.layers = [
            DecoderLayer(config, index, weights, self.communicator, streamer)
            for index, weights in enumerate(layers)
            if weights.entries
        ]
        streamed = [layer.mlp for layer in self.layers if isinstance(layer.mlp, StreamedMoE)]
        for mlp, following in pairwise(streamed):
            mlp.guess = following.gate.__call__
        if top.has("lm_head"):
            self.norm = top.array("model.norm")
            self.lm_head = Linear(top.matrix("lm_head"))
        self.tune(TUNINGS[device_kind()])
        # An array that is still lazy belongs to this thread's stream, and could not be evaluated in another thread.
        mx.eval(self.parameters(), self._rope.periods)

    def tune(self, tuning: Tuning) -> None:
        """Use other constants than those of the device, to measure them."""
        self.tuning = tuning
        heads = max(layer.self_attn.num_heads for layer in self.layers)
        self.attention_cost = AttentionCost(AttentionShape.of(self.config, heads), tuning)
        for layer in self.layers:
            if isinstance(layer.mlp, MoE):
                per_expert = tuning.sort_min_per_expert * layer.mlp.num_experts
                layer.mlp.sort_min_choices = max(tuning.sort_min_choices, per_expert)

    def set_communicator(self, communicator: Communicator) -> None:
        """Use another communicator from the next step on."""
        self.communicator = communicator
        communicator.set_captured_layers(self._captured_layers)
        for layer in self.layers:
            layer.communicator = communicator

    def capture(self, layers: Sequence[int]) -> None:
        """Capture states for a draft model: the inputs of these layers, in each call of `hidden` from now on.

        Call it on all ranks between two steps. After each call of `hidden`, `captured` has the states of its tokens on
        the leader. On other ranks it is None.

        Args:
            layers: numbers of the layers, from 0; an empty list stops capturing.
        """
        self._captured_layers, self.captured = frozenset(layers), None
        self.communicator.set_captured_layers(self._captured_layers)

    @property
    def dtype(self) -> mx.Dtype:
        """Compute dtype."""
        return self.layers[0]["input_layernorm"].dtype

    @property
    def expert_stats(self) -> ExpertStats | None:
        """Counters of streamed experts; None if all experts are in memory. Safe from any thread."""
        return None if self.streamer is None else self.streamer.stats

    def interrupt(self) -> None:
        """Make the current step and all later ones fail if experts are streamed. Safe from any thread."""
        if self.streamer is not None:
            self.streamer.interrupt()

    def close(self) -> None:
        """End all reads of experts, and save the statistics of their use. It cannot stream afterwards."""
        if self.streamer is not None:
            self.streamer.close()

    @property
    def has_head(self) -> bool:
        """Whether this rank computes logits. In a pipeline only one rank does."""
        return "lm_head" in self

    def __call__(
        self,
        tokens: mx.array,
        cache: list[LatentCache] | None = None,
        pixel_values: mx.array | None = None,
        grid_thw: mx.array | Iterable[Sequence[int]] = (),
    ) -> mx.array:
        """Return the logits of every position.

        Args:
            tokens: (batch, length) integers below vocab_size.
            cache: caches from make_cache, extended by the call; None for a new one.
            pixel_values: patches of the images of these tokens, as of image_features; batch is 1 then, and each
                `media_placeholder_token_id` among the tokens stands for one feature.
            grid_thw: grids of these images.

        Returns:
            (batch, length, vocab_size) in the compute dtype. A rank of a pipeline without the head returns the hidden
            states that it sends, which must be evaluated.

        Raises:
            VisionError: as of image_features, or the tokens have another number of placeholders.
        """
        length = tokens.shape[1]
        images: list[ImageRows] = []
        if pixel_values is not None:
            features = self.image_features(pixel_values, grid_thw)
            images = place_features(tokens, self._tower.config.media_placeholder_token_id, features)
        hidden = self.hidden(tokens, [SequenceSlice(cache or self.make_cache(), length, length)], images)
        return self.logits(hidden) if self.has_head else hidden

    def image_features(self, pixels: mx.array, grid_thw: mx.array | Iterable[Sequence[int]]) -> mx.array:
        """Return the features of images, (T, hidden_size) in the compute dtype, evaluated.

        Args:
            pixels: (P, 3, patch_size, patch_size), patches of all images; see kimi_mlx.model.vision.Encoding.
            grid_thw: (images, 3) integers: frames, rows and columns of patches.

        Raises:
            VisionError: the model has no vision tower here, or the grids do not fit the patches.
        """
        return self._tower(pixels, grid_thw)

    @property
    def _tower(self) -> VisionTower:
        if self.vision is None:
            raise VisionError(
                "the model has no vision tower in this process, so it takes no images",
                hint="use a model that sees images: `kimi-mlx models` lists them; of several ranks only rank 0 has it",
            )
        return self.vision

    def hidden(self, tokens: mx.array, slices: Sequence[SequenceSlice], features: Sequence[ImageRows] = ()) -> mx.array:
        """Return the hidden states before the last norm, (B, L) -> (B, M, D), and extend the caches.

        Args:
            tokens: (B, L) integers, the tokens of all slices concatenated; in a pipeline only rank 0 reads them. B is
                1 if there are several slices.
            slices: sequences of the tokens. The last layer computes only the M states that need logits.
            features: features of images that replace embeddings, in the order of their tokens; B is 1 if there are any.
                Ignored on a rank without the embedding.

        Returns:
            The input of `logits`. On a rank of a pipeline it is what the rank sends, and must be evaluated.
        """
        if "embed_tokens" in self:
            x = replace_rows(self.embed_tokens(tokens), features)
        else:
            x = self.communicator.recv_from_previous_stage(tokens)
            if self.streamer is not None:
                mx.eval(x)  # the sender may still read experts, and no GPU operation may wait for that long
        layout = BatchLayout(
            self._rope,
            [(slice_.cache[0].offset, slice_.length) for slice_ in slices],
            self.attention_cost,
            shared=[slice_.cache[0].shared for slice_ in slices],
        )
        self.communicator.divide_queries(layout)
        caches = list(zip(*(slice_.cache for slice_ in slices), strict=True))
        inputs: list[mx.array] = []
        for layer, layer_caches in zip(self.layers[:-1], caches[:-1], strict=True):
            inputs.append(x)
            x = layer(x, layer_caches, layout, layout)
        if self._captured_layers:
            numbered = enumerate([*inputs, x], self._first_layer)
            self.captured = self.communicator.capture([h for number, h in numbered if number in self._captured_layers])
        counts = [slice_.num_logits for slice_ in slices]
        num_logits = sum(counts)
        query_layout = layout
        if not self.communicator.has_next_stage:
            query_layout = layout.query_layout(counts if num_logits else [1, *counts[1:]])
            self.communicator.divide_queries(query_layout)
        return self.communicator.send_to_next_stage(
            self.layers[-1](x, caches[-1], layout, query_layout), tokens, num_logits
        )

    def logits(self, hidden: mx.array) -> mx.array:
        """(B, M, D) -> (B, M, vocab_size). Call it in the order of the calls of `hidden`."""
        return self.head(self.last_states(hidden))

    def last_states(self, hidden: mx.array) -> mx.array:
        """Return the input of the head, (B, M, D) -> (B, M, D). Call it in the order of the calls of `hidden`."""
        h = mx.fast.rms_norm(self.communicator.recv_last_hidden(hidden), self["norm"], self.config.rms_norm_eps)
        self.communicator.check_same("final hidden states", h)
        return h

    def head(self, states: mx.array) -> mx.array:
        """Return the logits of last states, (B, M, D) -> (B, M, vocab_size). All ranks with a head call it alike."""
        return self.communicator.gather_logits(self.lm_head(states))

    def make_cache(self) -> list[LatentCache]:
        """Return empty caches for one batch of sequences."""
        return [LatentCache() for _ in self.layers]
