"""The reference's products equal MLX's with quantized matrices."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.gpu_check.reference import plain_products

OPTIONS: dict[str, Any] = {"transpose": True, "group_size": 32, "bits": 4, "mode": "affine"}


def quantized(*shape: int) -> Any:
    return list(mx.quantize(mx.random.normal(shape, key=mx.random.key(1)), group_size=32, bits=4))


@pytest.mark.parametrize("transpose", [True, False])
def test_products_equal_those_with_quantized_matrices(transpose: bool) -> None:
    matrices = quantized(3, 64, 32)
    x = mx.random.normal((2, 1, 5, 32 if transpose else 64), key=mx.random.key(2))
    options = {**OPTIONS, "transpose": transpose}
    original = mx.quantized_matmul
    expected = mx.quantized_matmul(x, *matrices, **options)
    with plain_products():
        got = mx.quantized_matmul(x, *matrices, **options)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-5, atol=1e-5)
    assert mx.quantized_matmul is original


@pytest.mark.parametrize("is_sorted", [True, False])
def test_gathered_products_equal_those_with_quantized_matrices(is_sorted: bool) -> None:
    matrices = quantized(4, 64, 32)
    if is_sorted:
        x = mx.random.normal((6, 1, 32), key=mx.random.key(3))
        ids, inputs = mx.array([0, 0, 1, 3, 3, 3], mx.uint32), None
    else:
        x = mx.random.normal((1, 2, 1, 1, 32), key=mx.random.key(3))
        ids = mx.array([[[3, 0, 1], [1, 2, 0]]], mx.uint32)
        inputs = mx.arange(2, dtype=mx.uint32).reshape(1, 2, 1)
    options = {**OPTIONS, "lhs_indices": inputs, "rhs_indices": ids, "sorted_indices": is_sorted}
    expected = mx.gather_qmm(x, *matrices, **options)
    with plain_products():
        got = mx.gather_qmm(x, *matrices, **options)
    assert got.shape == expected.shape
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-5, atol=1e-5)
