"""Read slices of a checkpoint's tensors through memory maps, so that only the slices are read from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import ModelConfig
from kimi_mlx.model.config_quantization import Fp8Blocks, PackedInts
from kimi_mlx.parallel.placement import Range
from kimi_mlx.weights.checkpoint import Checkpoint, CheckpointTensors, read_checkpoint
from kimi_mlx.weights.dequantize import dequantize
from kimi_mlx.weights.fp8 import decode as decode_fp8
from kimi_mlx.weights.header import TensorInfo
from kimi_mlx.weights.matrix_format import MatrixField
from kimi_mlx.weights.packed_int4 import affine_biases
from kimi_mlx.weights.plan import ArrayPlan, SliceCopy, as_shape3

NUMPY_TYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "U32": np.uint32,
    "I32": np.uint32,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
    "I64": np.int64,
    "BOOL": np.bool_,
}
"""numpy type for each stored type: bfloat16 as uint16, packed integers as unsigned."""

ReadRange = Callable[[TensorInfo], bytes]
"""Returns the bytes of a tensor."""


C = TypeVar("C", bound=CheckpointTensors)


class CheckpointReader(Generic[C]):
    """Reader of tensors in files on this machine.

    Args:
        checkpoint: table of the tensors.
        paths: path on this machine of each file of the table; None if the table has these paths.
        read_range: function that reads a whole (small) tensor of a file that is not on this machine; None if all
            files are.
    """

    def __init__(
        self,
        checkpoint: C,
        paths: Mapping[Path, Path] | None = None,
        read_range: ReadRange | None = None,
    ):
        self.checkpoint = checkpoint
        self._paths = paths
        self._read_range = read_range
        self._maps: dict[Path, np.ndarray] = {}

    def read_into(self, plan: ArrayPlan, array: np.ndarray) -> None:
        """Fill an array slice by slice.

        Args:
            plan: plan of the array.
            array: array of the plan's shape; bfloat16 as uint16.
        """
        stack = array.reshape(as_shape3(plan.shape))
        for copy in plan.copies:
            members, rows, _ = copy.shape
            # numpy releases the GIL while it copies, so that a rank's heartbeat continues
            stack[copy.member : copy.member + members, copy.row : copy.row + rows] = self.read_slice(copy)

    def read_slice(self, copy: SliceCopy) -> np.ndarray:
        """Read one slice in the canonical form, in its planned shape; without conversion, as a view of a memory map."""
        field = copy.field
        if field.decode == "fp8":
            values = self._read_fp8_slice(copy)
        elif field.decode == "dequantize":
            values = copy.tensor_slice.view(self._dequantize(field))
        else:
            stored = self.read(field.tensors[0])
            if copy.tensor_slice.source.kernel is not None:
                stored = _as_matrix(stored, field)
            values = self._decode(field, copy.tensor_slice.view(stored))
            return values.reshape(copy.shape)
        return to_stored_type(values.reshape(copy.shape), field.dtype)

    def read(self, name: str) -> np.ndarray:
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

    def close(self) -> None:
        """Drop the memory maps."""
        self._maps.clear()

    def _decode(self, field: MatrixField, stored: np.ndarray) -> np.ndarray:
        """Return stored values in the canonical form: unchanged, or biases made from scales."""
        if field.decode != "biases":
            return stored
        packed = self.checkpoint.compression
        assert isinstance(packed, PackedInts)
        return affine_biases(stored, packed.bits)

    def _dequantize(self, field: MatrixField) -> np.ndarray:
        """Return a whole matrix or vector that is stored quantized, as float32."""
        assert field.quantized is not None
        arrays = [self._decode(part, self.read(part.tensors[0])) for part in field.quantized.fields]
        return np.array(dequantize(field.quantized, arrays))

    def _read_fp8_slice(self, copy: SliceCopy) -> np.ndarray:
        blocks = self.checkpoint.compression
        assert isinstance(blocks, Fp8Blocks)
        stored, factors = (self.read(name) for name in copy.field.tensors)
        block = (blocks.block_rows, blocks.block_columns)
        part, source = copy.tensor_slice, copy.tensor_slice.source
        if source.heads is not None or source.blocks:
            return part.view(decode_fp8(stored, factors, block))
        if part.stack is not None:
            stack = _slice(part.stack)
            stored, factors = stored[stack], factors[stack]
        return decode_fp8(stored, factors, block, _slice(part.rows), _slice(part.columns))


def open_checkpoint(folder: Path, config: ModelConfig) -> CheckpointReader[Checkpoint]:
    """Open the checkpoint in a folder; raises as read_checkpoint does."""
    return CheckpointReader(read_checkpoint(folder, config))


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


def cast_floats(values: np.ndarray, source: str, target: str) -> np.ndarray:
    """Convert stored floats to another type, as MLX does: bfloat16 (as uint16) rounds to the nearest, ties to even.

    Args:
        values: values of the type `source`.
        source: stored type: `F32`, `F16` or `BF16`.
        target: type of the result.
    """
    if source == target:
        return values
    is_bfloat16 = source == "BF16"
    wide = (values.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else values.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        return to_stored_type(wide, target)


def _as_matrix(stored: np.ndarray, field: MatrixField) -> np.ndarray:
    """Return a convolution as a matrix: (rows, channels * height * width)."""
    channels_second = stored.transpose(0, 3, 1, 2) if field.decode == "channels_last" else stored
    return channels_second.reshape(len(stored), -1)


def _slice(span: Range | None) -> slice:
    return slice(None) if span is None else slice(span.start, span.stop)


def _map(path: Path) -> np.ndarray:
    try:
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise WeightsError(f"`{path}` cannot be read: {error.strerror}", hint="check its permissions") from error
