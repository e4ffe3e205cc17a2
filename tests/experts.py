"""Experts of tests: sources of a model's experts, and what each of them must contain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.model.aligned_array import aligned_array, shared_view
from kimi_mlx.model.config import load_config
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.parallel.placement import RankShare
from kimi_mlx.weights.assemble import load_layer
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES, ExpertArray
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.layer_plan import plan_layer
from kimi_mlx.weights.reader import open_checkpoint


def resident_layers(folder: Path, share: RankShare | None, dtype: mx.Dtype) -> dict[int, LayerWeights]:
    """Return the MoE layers of a checkpoint, loaded completely."""
    config = load_config(folder)
    reader = open_checkpoint(folder, config)
    layers = {
        number: load_layer(reader, plan_layer(reader.checkpoint, number, share), dtype)
        for number in range(config.num_hidden_layers)
    }
    return {number: weights for number, weights in layers.items() if weights.has(EXPERT_ENTRIES["down"])}


def expected_arrays(weights: LayerWeights, arrays: Sequence[ExpertArray], expert: int) -> list[np.ndarray]:
    """Return the arrays of an expert as slices of the stacks of a loaded layer."""
    values: list[np.ndarray] = []
    for array in arrays:
        weight = weights.matrices(EXPERT_ENTRIES[array.matrix])[array.part]
        stack = getattr(weight, "weight" if array.field == "weight" else array.field)
        values.append(shared_view(stack)[expert - weights.first_expert])
    return values


def new_destination(arrays: Sequence[ExpertArray], is_aligned: bool = True) -> list[np.ndarray]:
    """Return arrays for one expert, filled with a byte that no test expects."""
    views: list[np.ndarray] = []
    for array in arrays:
        if is_aligned:
            views.append(shared_view(aligned_array(array.shape, MLX_TYPES[array.dtype])))
        else:
            dtype = shared_view(mx.zeros((1,), MLX_TYPES[array.dtype])).dtype
            flat = np.zeros(array.size_bytes + dtype.itemsize, np.uint8)[dtype.itemsize :]
            views.append(flat.view(dtype).reshape(array.shape))
        views[-1].reshape(-1).view(np.uint8)[:] = 0xAA
    return views


def read_expert(reader: ExpertReader, layer: int, expert: int, is_aligned: bool = True) -> list[np.ndarray]:
    """Read one expert into new arrays."""
    destination = new_destination(reader.arrays(layer), is_aligned)
    reader.read(layer, expert, destination).result()
    return destination
