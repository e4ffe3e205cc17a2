"""Dequantize matrices with MLX."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kimi_mlx.weights.matrix_format import MatrixFormat

MLX_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U8": mx.uint8}
"""MLX's type for each type of the canonical form."""

FLOAT_NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
"""Name of each compute dtype in safetensors files."""


def dequantize(matrix: MatrixFormat, arrays: Sequence[np.ndarray]) -> mx.array:
    """Return the values of a matrix as float32.

    Args:
        matrix: format of the matrix.
        arrays: one array per field of the format, in the canonical form; bfloat16 as uint16.
    """
    weight, *scales = (
        mx.array(np.ascontiguousarray(array)).view(MLX_TYPES[field.dtype])
        for field, array in zip(matrix.fields, arrays, strict=True)
    )
    quantization = matrix.quantization
    if quantization is None:
        return weight.astype(mx.float32)
    shape = (*weight.shape[:-1], -1)
    if weight.ndim == 1:  # MLX dequantizes matrices only
        weight, *scales = (array[None] for array in (weight, *scales))
    scales = [scale if scale.dtype == mx.uint8 else scale.astype(mx.float32) for scale in scales]
    biases = scales[1] if len(scales) == 2 else None
    return mx.dequantize(weight, scales[0], biases, dtype=mx.float32, **quantization.arguments).reshape(shape)
