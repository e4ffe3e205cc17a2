"""Experts that are not all in memory: the same bits as with all of them.

On a GPU the kernel of a product depends on the number of pairs and of experts in a stack, which differ
(kimi_mlx.model.streamed_moe). Experts are read from memory here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import RandomWeights, model_config, random_tokens
from kimi_mlx.model.aligned_array import shared_view
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.expert_budget import min_expert_bytes
from kimi_mlx.model.expert_format import ExpertFormat, MatrixFormat, RoutedExperts
from kimi_mlx.model.expert_streamer import ExpertStreamer, streamed_layers
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

KEPT_SHARES = (0.0, 0.5)
"""Shares of the experts that are kept in memory."""


class EndedRead:
    """A read that ended when it was requested."""

    is_done = True

    def cancel(self) -> bool:
        """Return False: it has ended."""
        return False

    def promote(self) -> None:
        """Do nothing."""

    def result(self) -> None:
        """Do nothing."""


class CopyingReader:
    """Reads experts from arrays in memory, at once."""

    def __init__(self) -> None:
        self.experts: dict[tuple[int, int], list[np.ndarray]] = {}
        """Arrays by layer and expert."""

    def add(self, layer: int, first: int, stacks: Sequence[mx.array]) -> None:
        """Add experts of a layer.

        Args:
            layer: number of the layer.
            first: number of the first expert.
            stacks: stacks of the experts, one for each array of their format.
        """
        for stack in stacks:
            for expert, array in enumerate(shared_view(stack), first):
                self.experts.setdefault((layer, expert), []).append(array.copy())

    def read(self, layer: int, expert: int, destination: Sequence[np.ndarray], is_guess: bool = False) -> EndedRead:
        """Copy an expert."""
        for target, source in zip(destination, self.experts[layer, expert], strict=True):
            target[:] = source
        return EndedRead()

    def close(self) -> None:
        """Do nothing."""


def split_routed(weights: LayerWeights, layer: int, reader: CopyingReader) -> LayerWeights:
    """Move the routed experts of a layer to a reader; a layer without any is unchanged."""
    if not weights.has(STACKS[0]):
        return weights
    gate_up, down = weights.matrices(STACKS[0]), weights.matrix(STACKS[1])
    num_routed = down.weight.shape[0] - weights.num_fused_shared
    stacks = [array[:num_routed] for part in (*gate_up, down) for array in part.arrays]
    mx.eval(stacks)
    reader.add(layer, weights.first_expert, stacks)
    entries = {name: parts for name, parts in weights.entries.items() if name not in STACKS}
    if weights.num_fused_shared:
        entries |= {name: [_tail(part, num_routed) for part in weights.matrices(name)] for name in STACKS}
    expert_format = ExpertFormat(tuple(map(MatrixFormat.of, gate_up)), MatrixFormat.of(down))
    return replace(weights, entries=entries, routed=RoutedExperts(expert_format, num_routed, expert_format.num_bytes))


def check(context: Context) -> None:
    """Compare hidden states of prompts of several lengths."""
    config = model_config(context.sizes)
    weights = RandomWeights(config)
    for dtype in context.dtypes if context.device == "gpu" else (mx.float32,):  # a CPU has one kernel for all cases
        with context.on_device():
            resident = weights.model(dtype)
            expected = [np.array(_states(resident, length)) for length in context.sizes.prompts]
            for share in KEPT_SHARES:
                streamed = _streamed_model(weights, dtype, share)
                for length, states in zip(context.sizes.prompts, expected, strict=True):
                    is_equal = np.array_equal(np.array(_states(streamed, length)), states)
                    context.require(f"{length} tokens, {share:.0%} kept, {dtype}", is_equal)


def _states(model: Model, length: int) -> mx.array:
    return model(random_tokens(length, model.config.vocab_size)).astype(mx.float32)


def _streamed_model(weights: RandomWeights, dtype: mx.Dtype, share: float) -> Model:
    config, reader = weights.config, CopyingReader()
    layers = [split_routed(each, layer, reader) for layer, each in enumerate(weights.layers(dtype))]
    routed = {layer: each.routed for layer, each in enumerate(layers) if each.routed is not None}
    streamed = streamed_layers(routed)
    num_bytes = min_expert_bytes(streamed, config.num_experts_per_tok) + int(
        share * sum(layer.num_experts * layer.expert_bytes for layer in streamed)
    )
    streamer = ExpertStreamer(reader, routed, 0, num_bytes, config.num_experts_per_tok)
    model = Model(config, weights.top(dtype), layers, streamer=streamer)
    list(streamer.fill())
    return model


def _tail(part: Weight, start: int) -> Weight:
    arrays = [mx.contiguous(array[start:]) for array in part.arrays]
    mx.eval(arrays)
    return Weight(*arrays, quantization=part.quantization, dtype=part.dtype)
