"""Products with quantized matrices, computed by numpy in float32, for the reference on the CPU.

So the reference uses none of MLX's kernels for quantized matrices, which are checked. It is also faster: on Linux,
MLX's matrix products use one thread of the CPU, numpy's use all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np


@contextmanager
def plain_products() -> Iterator[None]:
    """Replace MLX's products with quantized matrices while the block runs."""
    originals = mx.quantized_matmul, mx.gather_qmm
    mx.quantized_matmul, mx.gather_qmm = quantized_matmul, gather_qmm  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        mx.quantized_matmul, mx.gather_qmm = originals  # pyright: ignore[reportAttributeAccessIssue]


def quantized_matmul(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *, transpose: bool, **quantization: Any
) -> mx.array:
    """Compute mx.quantized_matmul with numpy. This evaluates the arrays."""
    matrix = np.array(mx.dequantize(w, scales, biases, **quantization))
    return mx.array(np.array(x) @ (matrix.swapaxes(-1, -2) if transpose else matrix))


def gather_qmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array,
    *,
    lhs_indices: mx.array | None,
    rhs_indices: mx.array,
    transpose: bool,
    sorted_indices: bool,
    **quantization: Any,
) -> mx.array:
    """Compute mx.gather_qmm with numpy, matrix by matrix. This evaluates the arrays.

    Args:
        x: (..., 1, columns).
        w: (matrices, rows, packed columns), with its scales and biases.
        lhs_indices: indices into the leading dimensions of x, broadcast against rhs_indices; None for one row each.
        rhs_indices: indices of the matrices.
        transpose: must be true.
        sorted_indices: ignored; whether rhs_indices are in ascending order.
        quantization: arguments of mx.dequantize.
    """
    assert transpose
    ids = np.array(rhs_indices)
    rows = np.arange(ids.size) if lhs_indices is None else np.broadcast_to(np.array(lhs_indices), ids.shape).reshape(-1)
    inputs = np.array(x).reshape(-1, x.shape[-1])
    out = np.empty((ids.size, w.shape[-2]), np.float32)
    for index in map(int, np.unique(ids)):
        positions = np.flatnonzero(ids.reshape(-1) == index)
        out[positions] = (
            inputs[rows[positions]] @ np.array(mx.dequantize(w[index], scales[index], biases[index], **quantization)).T
        )
    return mx.array(out).reshape(*ids.shape, 1, -1)
