"""Open a file of a store: the weights of a layer, of the top, or of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.store.manifest import StoredFile, StoredWeight
from kimi_mlx.weights.assemble import make_weight
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES
from kimi_mlx.weights.header import read_header
from kimi_mlx.weights.plan import array_name
from kimi_mlx.weights.reader import NUMPY_TYPES


def open_layer_file(path: Path, file: StoredFile, dtype: mx.Dtype, hint: str, with_experts: bool) -> LayerWeights:
    """Open a file of a store; its arrays are read when they are evaluated.

    Args:
        path: path of the file.
        file: the file in the manifest.
        dtype: compute dtype.
        hint: remedy for a damaged file.
        with_experts: whether to include routed experts that are stored as stacks; if not, stacks have only the shared
            experts, or do not exist.

    Raises:
        WeightsError: the file is unreadable or differs from the manifest.
    """
    try:
        arrays = cast(dict[str, mx.array], mx.load(str(path)))  # lazy
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"the store's file `{path}` cannot be read: {error}", hint=hint) from error
    entries = {
        entry: [
            make_weight(
                _arrays(path, arrays, array_names(entry, number, len(parts), part), part, hint),
                part.quantization,
                entry,
                dtype,
            )
            for number, part in enumerate(parts)
        ]
        for entry, parts in file.entries.items()
        if with_experts or entry not in EXPERT_ENTRIES.values()
    }
    if not with_experts and file.num_fused_shared:
        for entry in EXPERT_ENTRIES.values():
            parts = file.entries.get(entry, ())
            entries[entry] = [
                make_weight(
                    _shared_experts(path, array_names(entry, number, len(parts), part), file.num_fused_shared),
                    part.quantization,
                    entry,
                    dtype,
                )
                for number, part in enumerate(parts)
            ]
    return LayerWeights(entries, file.latent_first, file.num_fused_shared, file.first_expert)


def array_names(entry: str, number: int, num_parts: int, weight: StoredWeight) -> list[str]:
    """Return the names of a weight's arrays in a file."""
    return [array_name(entry, number, num_parts, name) for name in weight.arrays]


def _arrays(
    path: Path, arrays: Mapping[str, mx.array], names: list[str], weight: StoredWeight, hint: str
) -> list[mx.array]:
    """Return the arrays of a weight, checked against the manifest."""
    checked_arrays: list[mx.array] = []
    for name, expected in zip(names, weight.arrays.values(), strict=True):
        array = arrays.get(name)
        if array is None or array.shape != expected.shape or array.dtype != MLX_TYPES.get(expected.dtype):
            entry = name.rpartition(".")[0]
            raise WeightsError(
                f"the store's file `{path}` does not have the `{entry}` that its manifest lists", hint=hint
            )
        checked_arrays.append(array)
    return checked_arrays


def _shared_experts(path: Path, names: list[str], num_shared: int) -> list[mx.array]:
    """Read the last members of stacks, without the others."""
    header = read_header(path)
    arrays: list[mx.array] = []
    for name in names:
        table = header[name]
        dtype = np.dtype(NUMPY_TYPES[table.dtype])
        member_bytes = table.size_bytes // table.shape[0]
        first = table.start + (table.shape[0] - num_shared) * member_bytes
        values = np.fromfile(path, dtype, num_shared * member_bytes // dtype.itemsize, offset=first)
        arrays.append(mx.array(values.reshape(num_shared, *table.shape[1:])).view(MLX_TYPES[table.dtype]))
    return arrays
