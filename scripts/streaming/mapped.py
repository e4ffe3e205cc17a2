"""A model whose experts are in a memory map of the store: the page cache of the system decides which are in memory.

The pages of an MLX array are replaced by a map of the records, so that MLX's kernels read the file without a copy. This
is for MLX's CPU backend.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.aligned_array import aligned_array, shared_view
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.store.layer_file import open_layer_file
from kimi_mlx.store.manifest import Manifest, StoredExperts
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.weights.assemble import build_model, make_weight
from kimi_mlx.weights.dequantize import MLX_TYPES
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES
from kimi_mlx.weights.file_layout import RECORDS_NAME
from kimi_mlx.weights.header import DTYPE_BYTES, read_header

MAP_FIXED = 0x10
"""Flag of mmap, equal on Linux and macOS: replace what is at the address."""


def load_mapped(folder: Path, manifest: Manifest, config: ModelConfig, dtype: mx.Dtype) -> Model:
    """Load the store of rank 0 with its experts in a memory map.

    Args:
        folder: folder of the placement.
        manifest: manifest of rank 0.
        config: configuration of the model.
        dtype: compute dtype; floats of experts must have it.
    """
    path = rank_folder(folder, 0)

    def layers() -> Iterator[LayerWeights]:
        for file in manifest.files:
            weights = open_layer_file(path / file.name, file, dtype, "", file.experts is None)
            yield weights if file.experts is None else _with_map(weights, path / file.name, file.experts, dtype)

    return build_model(config, layers(), LayerWeights({}), None, lambda done, total: None)


def _with_map(weights: LayerWeights, path: Path, experts: StoredExperts, dtype: mx.Dtype) -> LayerWeights:
    """Add the routed experts to the shared ones of a layer."""
    record_bytes, num_shared = experts.record.record_bytes, weights.num_fused_shared
    num_members = experts.num_experts + num_shared
    memory = aligned_array((num_members * record_bytes // 4,), mx.uint32)
    view = shared_view(memory)
    _map(view, path, read_header(path)[RECORDS_NAME].start, experts.num_experts * record_bytes)
    stacks: dict[tuple[str, int], list[mx.array]] = {}
    for array, start in zip(experts.arrays, experts.record.offsets, strict=True):
        size = DTYPE_BYTES[array.dtype]
        typed = memory if array.dtype == "U32" else memory.view(MLX_TYPES[array.dtype])
        stack = mx.as_strided(
            typed,
            (num_members, *array.shape),
            (record_bytes // size, array.shape[1], 1),
            start // size,
        )
        mx.eval(stack)
        entry = EXPERT_ENTRIES[array.matrix]
        if num_shared:
            shared = getattr(weights.matrices(entry)[array.part], array.field)
            mx.eval(shared)
            np.asarray(stack)[experts.num_experts :] = shared_view(shared)
        stacks.setdefault((entry, array.part), []).append(stack)
    quantizations = {(EXPERT_ENTRIES[array.matrix], array.part): array.quantization for array in experts.arrays}
    entries = {
        entry: [make_weight(stacks[key], quantizations[key], entry, dtype) for key in stacks if key[0] == entry]
        for entry in EXPERT_ENTRIES.values()
    }
    return replace(weights, entries={**weights.entries, **entries})


def _map(view: np.ndarray, path: Path, offset: int, num_bytes: int) -> None:
    """Replace the first bytes of an array, which begins at a page, by a map of a part of a file.

    The map is private: a write would not change the file.
    """
    address = view.__array_interface__["data"][0]
    assert address % mmap.PAGESIZE == 0
    assert offset % mmap.PAGESIZE == 0
    assert num_bytes % mmap.PAGESIZE == 0
    map_pages = ctypes.CDLL(None, use_errno=True).mmap
    map_pages.restype = ctypes.c_void_p
    map_pages.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    handle = os.open(path, os.O_RDONLY)
    try:
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | MAP_FIXED
        if map_pages(address, num_bytes, protection, flags, handle, offset) != address:
            raise WeightsError(f"`{path}` cannot be mapped: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(handle)
