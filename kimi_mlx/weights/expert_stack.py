"""Load all routed experts of layers into stacks, for a model that keeps all experts in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from kimi_mlx.model.aligned_array import aligned_array, shared_view
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, ExpertArray
from kimi_mlx.weights.expert_reader import ExpertReader, Read


@dataclass(frozen=True)
class _Layer:
    """A layer whose experts are being read.

    Args:
        stacks: stack of each array, with the shared experts at its end.
        views: the same memory.
        reads: reads of all routed experts.
    """

    stacks: list[mx.array]
    views: list[np.ndarray]
    reads: list[Read]


class ExpertStacks:
    """Loads the experts of one layer after the other, and reads one layer ahead.

    Args:
        reader: reader of the experts.
        dtype: compute dtype, which is also that of `reader`.
        num_shared: for each layer of `reader`, the number of shared experts in its stacks.
    """

    def __init__(self, reader: ExpertReader, dtype: mx.Dtype, num_shared: Mapping[int, int]):
        self._reader, self._dtype, self._num_shared = reader, dtype, num_shared
        self._next = sorted(reader.sources)
        self._begun: dict[int, _Layer] = {}

    def complete(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """Return the weights of a layer with all of its routed experts. Call it in the order of the layers.

        Args:
            layer: number of the layer.
            weights: the layer without its routed experts; its stacks, if any, have only the shared ones.

        Raises:
            WeightsError: an expert cannot be read.
        """
        while self._next and (layer not in self._begun or len(self._begun) == 1):
            number = self._next.pop(0)
            self._begun[number] = self._begin(number)
        begun, arrays = self._begun.pop(layer), self._reader.arrays(layer)
        num_experts = self._reader.sources[layer].num_experts
        for array, view in zip(arrays, begun.views, strict=True):
            if self._num_shared[layer]:
                shared = getattr(weights.matrices(EXPERT_ENTRIES[array.matrix])[array.part], array.field)
                mx.eval(shared)
                view[num_experts:] = shared_view(shared)
        for read in begun.reads:
            read.result()
        return replace(weights, entries={**weights.entries, **_entries(arrays, begun.stacks, self._dtype)})

    def _begin(self, layer: int) -> _Layer:
        """Allocate the stacks of a layer, and start to read its experts."""
        source, arrays = self._reader.sources[layer], self._reader.arrays(layer)
        self._reader.read_ahead(layer)
        num_members = source.num_experts + self._num_shared[layer]
        stacks = [aligned_array((num_members, *array.shape), MLX_TYPES[array.dtype]) for array in arrays]
        views = [shared_view(stack) for stack in stacks]
        reads = [
            self._reader.read(layer, source.first_expert + index, [view[index] for view in views])
            for index in range(source.num_experts)
        ]
        return _Layer(stacks, views, reads)


def _entries(arrays: Sequence[ExpertArray], stacks: Sequence[mx.array], dtype: mx.Dtype) -> dict[str, list[Weight]]:
    """Return stacks as entries of the canonical tree: name -> parts."""
    fields: dict[tuple[str, int], dict[str, mx.array]] = {}
    quantizations: dict[tuple[str, int], Quantization | None] = {}
    for array, stack in zip(arrays, stacks, strict=True):
        key = (EXPERT_ENTRIES[array.matrix], array.part)
        fields.setdefault(key, {})[array.field] = stack
        quantizations[key] = array.quantization
    entries: dict[str, list[Weight]] = {}
    for (entry, number), arrays_of_part in fields.items():  # in the order of the parts
        weight = Weight(**arrays_of_part, quantization=quantizations[entry, number], dtype=dtype)
        entries.setdefault(entry, []).append(weight)
    return entries
