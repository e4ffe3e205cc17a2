"""Load all routed experts of a layer into stacks, the form in which a model that keeps all of them computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from kimi_mlx.model.aligned_array import aligned_array, shared_view
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.weight import Weight
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, ExpertArray
from kimi_mlx.weights.expert_reader import ExpertReader


def with_expert_stacks(reader: ExpertReader, layer: int, weights: LayerWeights, dtype: mx.Dtype) -> LayerWeights:
    """Return the weights of a layer with all of its routed experts, which are read here.

    Args:
        reader: reader of the experts; its compute type is `dtype`.
        layer: number of the layer.
        weights: the layer without its routed experts; its stacks, if any, have only the shared ones.
        dtype: compute dtype.

    Raises:
        WeightsError: an expert cannot be read.
    """
    source, arrays = reader.sources[layer], reader.arrays(layer)
    extra = [_shared_experts(weights, array) for array in arrays]
    num_shared = 0 if extra[0] is None else extra[0].shape[0]
    stacks = [
        aligned_array((source.num_experts + num_shared, *array.shape), MLX_TYPES[array.dtype]) for array in arrays
    ]
    views = [shared_view(stack) for stack in stacks]
    reads = [
        reader.read(layer, source.first_expert + index, [view[index] for view in views])
        for index in range(source.num_experts)
    ]
    for view, array in zip(views, extra, strict=True):
        if array is not None:
            view[source.num_experts :] = shared_view(array)
    for read in reads:
        read.result()
    entries = {**weights.entries, **_entries(arrays, stacks, dtype)}
    return replace(weights, entries=entries)


def _shared_experts(weights: LayerWeights, array: ExpertArray) -> mx.array | None:
    """Return the shared experts at the end of a stack; None without any."""
    entry = EXPERT_ENTRIES[array.matrix]
    if not weights.has(entry):
        return None
    shared = getattr(weights.matrices(entry)[array.part], array.field)
    mx.eval(shared)
    return shared


def _entries(arrays: Sequence[ExpertArray], stacks: Sequence[mx.array], dtype: mx.Dtype) -> dict[str, list[Weight]]:
    """Return stacks as entries of the canonical tree: name -> parts."""
    fields: dict[tuple[str, int], dict[str, mx.array]] = {}
    quantizations: dict[tuple[str, int], Quantization | None] = {}
    for array, stack in zip(arrays, stacks, strict=True):
        key = (EXPERT_ENTRIES[array.matrix], array.part)
        fields.setdefault(key, {})[array.field] = stack
        quantizations[key] = array.quantization
    entries: dict[str, list[Weight]] = {}
    for (entry, _), parts in fields.items():  # in the order of their numbers
        weight = Weight(**parts, quantization=quantizations[entry, len(entries.get(entry, ()))], dtype=dtype)
        entries.setdefault(entry, []).append(weight)
    return entries
