"""Compute the arrays of a converted weight chunk by chunk: read slices, dequantize, quantize.

A chunk consists of whole rows of a matrix, so that memory use does not depend on the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.parallel.placement import Range
from kimi_mlx.weights.converted_files import ConvertedWeight
from kimi_mlx.weights.dequantize import MLX_TYPES, dequantize
from kimi_mlx.weights.matrix_format import MatrixFormat
from kimi_mlx.weights.plan import SliceCopy, WeightPlan
from kimi_mlx.weights.reader import CheckpointReader

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


def convert_chunk(reader: CheckpointReader, weight: ConvertedWeight, chunk: Chunk) -> list[np.ndarray]:
    """Return the arrays of a chunk as they are written: (members, rows, columns) each, bfloat16 as uint16."""
    fields = [reader.read_slice(copy) for copy in chunk.copies]
    if weight.is_copied:
        return fields
    matrix = MatrixFormat(tuple(copy.field for copy in chunk.copies), chunk.plan.quantization)
    values = dequantize(matrix, fields)
    return _quantize(weight.plan, values.swapaxes(1, 2) if weight.is_transposed else values)


def _quantize(plan: WeightPlan, values: mx.array) -> list[np.ndarray]:
    """Return the values in the types of the plan, quantized in float32.

    They are first rounded to the type of the scales, so that a group's bias, which is one of its values, is exact.
    """
    dtype = MLX_TYPES[plan.arrays[-1].dtype]
    if plan.quantization is None:
        arrays = [values.astype(dtype)]
    else:
        rounded = mx.contiguous(values.astype(dtype).astype(mx.float32))
        weight, *rest = mx.quantize(rounded, plan.quantization.group_size, plan.quantization.bits)
        arrays = [weight, *(array.astype(dtype) for array in rest)]
    return [np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array) for array in arrays]
