"""Compute the arrays of a converted weight chunk by chunk: read slices, dequantize, quantize.

A chunk consists of whole rows of a matrix, so that memory use does not depend on the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.parallel.placement import Range
from kimi_mlx.weights.converted_files import ConvertedWeight
from kimi_mlx.weights.dequantize import MLX_TYPES, dequantize
from kimi_mlx.weights.matrix_format import MatrixFormat
from kimi_mlx.weights.plan import SliceCopy, WeightPlan
from kimi_mlx.weights.reader import CheckpointReader
from kimi_mlx.weights.scale_search import quantize

CHUNK_VALUES = 1 << 24
"""Values converted at a time, rounded to whole rows: 64 MB in float32. An expert of K2 has 14.7 million."""


@dataclass(frozen=True)
class Chunk:
    """Some rows of some members of a stored weight.

    Args:
        copies: copy of each array of the stored weight (weight, and scales and biases), all of the same rows.
        plan: plan of the stored weight.
    """

    copies: tuple[SliceCopy, ...]
    plan: WeightPlan


def chunks(weight: ConvertedWeight) -> Iterator[Chunk]:
    """Split a weight into chunks of about CHUNK_VALUES values: some members, or some rows of one member."""
    for plan in weight.stored_plans:
        for copies in zip(*(array.copies for array in plan.arrays), strict=True):
            members, rows, columns = copies[0].shape
            num_columns = copies[0].field.packing.columns(columns)
            num_rows = rows if weight.is_transposed else min(rows, max(1, CHUNK_VALUES // num_columns))
            num_members = max(1, CHUNK_VALUES // (rows * num_columns)) if num_rows == rows else 1
            for member in range(0, members, num_members):
                for row in range(0, rows, num_rows):
                    some_members = Range(member, min(member + num_members, members))
                    some_rows = Range(row, min(row + num_rows, rows))
                    yield Chunk(tuple(copy.part(some_members, some_rows) for copy in copies), plan)


@dataclass(frozen=True)
class ConvertedChunk:
    """Arrays of a chunk, and the error of its quantization.

    Args:
        arrays: arrays as they are written: (members, rows, columns) each, bfloat16 as uint16.
        squared_error: (2,), see kimi_mlx.weights.scale_search.QuantizedBlock; None if scales were not searched.
    """

    arrays: list[np.ndarray]
    squared_error: np.ndarray | None = None


def convert_chunk(
    reader: CheckpointReader, weight: ConvertedWeight, chunk: Chunk, searches: bool, importance: np.ndarray | None
) -> ConvertedChunk:
    """Compute a chunk.

    Args:
        reader: reader of the source.
        weight: weight of the chunk.
        chunk: the chunk.
        searches: whether to search for scales of least error; else they are those of mlx-lm.
        importance: importance of the columns of all members of the weight, (members, columns); None if all are equal.

    Raises:
        WeightsError: a value that is quantized is not finite.
    """
    fields = [reader.read_slice(copy) for copy in chunk.copies]
    if weight.is_copied:
        return ConvertedChunk(fields)
    matrix = MatrixFormat(tuple(copy.field for copy in chunk.copies), chunk.plan.quantization)
    values = dequantize(matrix, fields)
    if weight.is_transposed:
        values = values.swapaxes(1, 2)
    dtype = MLX_TYPES[weight.plan.arrays[-1].dtype]
    if weight.plan.quantization is None:
        return ConvertedChunk([_to_numpy(values.astype(dtype))])
    if not searches:
        return ConvertedChunk(_quantize(weight.plan.quantization, dtype, values))
    first = chunk.copies[0].member
    columns = None if importance is None else mx.array(importance[first : first + len(values)])
    block = quantize(mx.contiguous(values), weight.plan.quantization, dtype, columns)
    error = np.array(block.squared_error)
    if not np.isfinite(error).all():
        raise WeightsError(
            f"`{weight.path}` has values that are not finite", hint="fetch the checkpoint again, or use another one"
        )
    return ConvertedChunk([_to_numpy(array) for array in block.arrays], error)


def _quantize(quantization: Quantization, dtype: mx.Dtype, values: mx.array) -> list[np.ndarray]:
    """Return the values quantized in float32 with scales from the smallest to the largest value.

    They are first rounded to the type of the scales, so that a group's bias, which is one of its values, is exact.
    """
    rounded = mx.contiguous(values.astype(dtype).astype(mx.float32))
    weight, *rest = mx.quantize(rounded, quantization.group_size, quantization.bits)
    return [_to_numpy(array) for array in (weight, *(array.astype(dtype) for array in rest))]


def _to_numpy(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
