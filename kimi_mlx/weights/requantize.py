"""Convert weights chunk by chunk: read slices, dequantize, split `kv_b_proj` by heads, quantize.

A chunk consists of whole rows of a matrix, so that memory use does not depend on the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.model.names import SourceMatrix
from kimi_mlx.parallel.placement import Range
from kimi_mlx.weights.assemble import MLX_TYPES
from kimi_mlx.weights.checkpoint import Checkpoint, MatrixFormat
from kimi_mlx.weights.convert_plan import WeightConversion
from kimi_mlx.weights.layer_plan import SliceCopy, TensorSlice
from kimi_mlx.weights.reader import CheckpointReader

CHUNK_VALUES = 1 << 24
"""Values converted at a time, rounded to whole rows: 64 MB in float32. An expert of K2 has 14.7 million."""


@dataclass(frozen=True)
class RowChunk:
    """Some rows of a source matrix.

    Args:
        matrix: stored format of the matrix.
        copies: slice of each field of the matrix.
        member: index in a matrix that is stored as a stack; else 0.
        row: first row in the output; the rows of a stack are counted through.
    """

    matrix: MatrixFormat
    copies: tuple[SliceCopy, ...]
    member: int
    row: int


def row_chunks(checkpoint: Checkpoint, output: WeightConversion) -> Iterator[RowChunk]:
    """Split the source of an output into chunks of whole rows and about CHUNK_VALUES values."""
    source = output.source
    if source.heads is not None or len(source.shape) == 1:
        yield _chunk(checkpoint, source, source.paths[0], 0, None, 0)
        return
    *leading, num_rows, num_columns = source.shape
    height = max(1, CHUNK_VALUES // num_columns)
    row = 0
    for path in source.paths:
        for member in range(leading[0] if leading else 1):
            for start in range(0, num_rows, height):
                stop = min(num_rows, start + height)
                yield _chunk(checkpoint, source, path, member, Range(start, stop), row)
                row += stop - start


def _chunk(
    checkpoint: Checkpoint, source: SourceMatrix, path: str, member: int, rows: Range | None, row: int
) -> RowChunk:
    matrix = checkpoint.matrix(path, source.suffix, source.shape)
    part = SourceMatrix((path,), source.shape, suffix=source.suffix)
    copies: list[SliceCopy] = []
    for field in matrix.fields:
        tensor_slice = TensorSlice(part, field.per, field.values, rows=rows)
        shape = tensor_slice.shape3(checkpoint.tensors[field.tensors[0]].shape)
        copies.append(SliceCopy(field, tensor_slice, shape, 0, row))
    return RowChunk(matrix, tuple(copies), member, row)


def convert_chunk(reader: CheckpointReader, output: WeightConversion, chunk: RowChunk) -> list[np.ndarray]:
    """Return the arrays of a chunk as the output stores them; bfloat16 as uint16."""
    fields = [reader.read_slice(copy)[chunk.member] for copy in chunk.copies]
    if output.is_copied:
        return fields
    return _encode(output, _by_heads(output, _decode(chunk.matrix, fields)))


def _decode(matrix: MatrixFormat, fields: list[np.ndarray]) -> mx.array:
    """Return the values of a matrix as float32."""
    arrays = [
        mx.array(np.ascontiguousarray(value)).view(MLX_TYPES[field.dtype])
        for field, value in zip(matrix.fields, fields, strict=True)
    ]
    if matrix.quantization is None:
        return arrays[0].astype(mx.float32)
    weight, scales, biases = arrays
    quantization = matrix.quantization
    return mx.dequantize(
        weight,
        scales.astype(mx.float32),
        biases.astype(mx.float32),
        group_size=quantization.group_size,
        bits=quantization.bits,
    )


def _by_heads(output: WeightConversion, values: mx.array) -> mx.array:
    """Return the keys (heads, latent, nope) or values (heads, v, latent) of `kv_b_proj`; other matrices unchanged."""
    if output.source.heads is None:
        return values
    heads, first, end = output.source.heads
    part = values.reshape(heads, -1, values.shape[-1])[:, first:end]  # (heads, rows, latent)
    return part.swapaxes(1, 2) if output.is_transposed else part


def _encode(output: WeightConversion, values: mx.array) -> list[np.ndarray]:
    """Return the values in the output's types, quantized in float32.

    They are first rounded to the type of the scales, so that a group's bias, which is one of its values, is exact.
    """
    dtype = MLX_TYPES[output.arrays[-1].dtype]
    if output.quantization is None:
        arrays = [values.astype(dtype)]
    else:
        rounded = mx.contiguous(values.astype(dtype).astype(mx.float32))
        weight, *rest = mx.quantize(rounded, output.quantization.group_size, output.quantization.bits)
        arrays = [weight, *(array.astype(dtype) for array in rest)]
    return [np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array) for array in arrays]
