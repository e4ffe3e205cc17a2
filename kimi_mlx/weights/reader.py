"""Read slices of a checkpoint's tensors through memory maps, so that only the slices are read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts
from kimi_mlx.parallel.placement import Range
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.fp8 import decode as decode_fp8
from kimi_mlx.weights.index import TensorInfo, read_index
from kimi_mlx.weights.layer_plan import ArrayPlan, SliceCopy, as_shape3
from kimi_mlx.weights.packed_int4 import affine_biases

NUMPY_TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,
    "I32": np.uint32,
    "F8_E4M3": np.uint8,
}
"""numpy type for each stored type: bfloat16 as uint16, packed integers as unsigned."""

ReadRange = Callable[[TensorInfo], bytes]


class CheckpointReader:
    """Reader of tensors in files on this machine.

    Args:
        checkpoint: table of the tensors.
        paths: path on this machine of each file of the table; None if the table has these paths.
        read_range: function that reads a whole (small) tensor of a file that is not on this machine; None if all
            files are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        paths: Mapping[Path, Path] | None = None,
        read_range: ReadRange | None = None,
    ):
        self.checkpoint = checkpoint
        self._paths = paths
        self._read_range = read_range
        self._maps: dict[Path, np.ndarray] = {}

    def read_array(self, plan: ArrayPlan) -> np.ndarray:
        """Read an array; a view of a memory map if it is one slice of a tensor."""
        if len(plan.copies) == 1:
            return self.read_slice(plan.copies[0]).reshape(plan.shape)
        array = np.empty(as_shape3(plan.shape), NUMPY_TYPES[plan.dtype])
        for copy in plan.copies:
            members, rows, _ = copy.shape
            array[copy.member : copy.member + members, copy.row : copy.row + rows] = self.read_slice(copy)
        return array.reshape(plan.shape)

    def read_slice(self, copy: SliceCopy) -> np.ndarray:
        """Read one slice in the canonical form, in its planned shape."""
        stored = self._stored(copy.field.tensors[0])
        if copy.field.decode == "fp8":
            return self._read_fp8_slice(copy, stored)
        part = copy.tensor_slice.view(stored).reshape(copy.shape)
        if copy.field.decode == "copy":
            return part
        packed = self.checkpoint.config.compression
        assert isinstance(packed, PackedInts)
        return affine_biases(part, packed.bits)

    def close(self) -> None:
        """Drop the memory maps."""
        self._maps.clear()

    def _read_fp8_slice(self, copy: SliceCopy, stored: np.ndarray) -> np.ndarray:
        blocks = self.checkpoint.config.compression
        assert isinstance(blocks, Fp8Blocks)
        factors = self._stored(copy.field.tensors[1])
        block = (blocks.block_rows, blocks.block_columns)
        tensor_slice, source = copy.tensor_slice, copy.tensor_slice.source
        if source.heads is None and not source.blocks and tensor_slice.stack is None:
            part = decode_fp8(stored, factors, block, _slice(tensor_slice.rows), _slice(tensor_slice.columns))
        else:
            part = tensor_slice.view(decode_fp8(stored, factors, block))
        return to_stored_type(part.reshape(copy.shape), copy.field.dtype)

    def _stored(self, name: str) -> np.ndarray:
        """Return a whole tensor, as stored."""
        info = self.checkpoint.tensors[name]
        dtype = np.dtype(NUMPY_TYPES[info.dtype])
        path = info.file if self._paths is None else self._paths.get(info.file)
        if path is None:
            assert self._read_range is not None
            return np.frombuffer(self._read_range(info), dtype).reshape(info.shape)
        if path not in self._maps:
            self._maps[path] = _map(path)
        return self._maps[path][info.start : info.start + info.size_bytes].view(dtype).reshape(info.shape)


def open_checkpoint(folder: Path, config: ModelConfig) -> CheckpointReader:
    """Open the checkpoint in a folder.

    Raises:
        WeightsError: files are missing or broken, or tensors are missing or unknown.
    """
    checkpoint = Checkpoint(config, read_index(folder), str(folder))
    checkpoint.check_names()
    return CheckpointReader(checkpoint)


def to_stored_type(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values to a stored type; bfloat16 (as uint16) to the nearest, ties to even.

    Args:
        values: float32 values, which may be infinite or NaN.
        dtype: stored type: `F32`, `F16` or `BF16`.
    """
    if dtype != "BF16":
        return values.astype(NUMPY_TYPES[dtype], copy=False)
    words = values.view(np.uint32)
    rounded = ((words + np.uint32(0x7FFF) + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _slice(span: Range | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop)


def _map(path: Path) -> np.ndarray:
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise WeightsError(f"`{path}` cannot be read: {error.strerror}", hint="check its permissions") from error
