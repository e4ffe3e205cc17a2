"""Connect a model to the reader of its routed experts: their format in memory, and the streamer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.expert_format import ArrayFormat, ExpertFormat, MatrixFormat, RoutedExperts
from kimi_mlx.model.expert_streamer import ExpertStreamer
from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import ExpertArray
from kimi_mlx.weights.expert_reader import ExpertReader


@dataclass(frozen=True)
class ExpertStreaming:
    """How a rank streams its routed experts.

    Args:
        reader: reader of the experts of all layers; the model closes it.
        num_bytes: memory for experts: slots and staging area.
        dtype: compute dtype.
        load_use: function that loads saved statistics into a new ExpertUse.
        save_use: function that saves the statistics; see ExpertStreamer.
    """

    reader: ExpertReader
    num_bytes: int
    dtype: mx.Dtype
    load_use: Callable[[ExpertUse], None] = lambda use: None
    save_use: Callable[[ExpertUse], None] = lambda use: None

    @property
    def all_bytes(self) -> int:
        """Bytes of all experts in memory."""
        routed = (self.routed(layer) for layer in self.reader.sources)
        return sum(experts.num_experts * experts.format.num_bytes for experts in routed)

    def routed(self, layer: int) -> RoutedExperts:
        """Return the routed experts of a layer."""
        source = self.reader.sources[layer]
        return RoutedExperts(
            expert_format(self.reader.arrays(layer), self.dtype), source.num_experts, source.expert_bytes
        )

    def with_routed(self, layers: Iterator[LayerWeights]) -> Iterator[LayerWeights]:
        """Add the routed experts to the layers, in their order."""
        for layer, weights in enumerate(layers):
            yield replace(weights, routed=self.routed(layer)) if layer in self.reader.sources else weights

    def streamer(self, config: ModelConfig) -> ExpertStreamer:
        """Return the streamer of a model with these experts."""
        sources = self.reader.sources
        routed = {layer: self.routed(layer) for layer in sorted(sources)}
        use = ExpertUse(list(routed), [each.num_experts for each in routed.values()], config.num_experts_per_tok)
        self.load_use(use)
        first = sources[min(sources)].first_expert
        return ExpertStreamer(
            self.reader, routed, first, self.num_bytes, config.num_experts_per_tok, use, self.save_use
        )


def expert_format(arrays: Sequence[ExpertArray], dtype: mx.Dtype) -> ExpertFormat:
    """Return the format of an expert.

    Args:
        arrays: its arrays in memory.
        dtype: compute dtype.
    """
    gate_up_parts = {array.part for array in arrays if array.matrix == "gate_up"}

    def matrix(name: str, part: int) -> MatrixFormat:
        own = [array for array in arrays if (array.matrix, array.part) == (name, part)]
        formats = tuple(ArrayFormat(array.shape, MLX_TYPES[array.dtype]) for array in own)
        return MatrixFormat(formats, own[0].quantization, dtype)

    return ExpertFormat(tuple(matrix("gate_up", part) for part in sorted(gate_up_parts)), matrix("down", 0))
