"""Packed integers: MLX's affine layout of them has exactly the stored values."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.weights.packed_int4 import affine_biases

GROUP = 32
NORMAL_SCALES = st.floats(2.0**-60, 2.0**60, width=32) | st.floats(-(2.0**60), -(2.0**-60), width=32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Truncate float32 values to bfloat16, and return the bits."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack (rows, columns) of q into int32 as compressed-tensors does, the first value in the lowest bits."""
    stored = (codes + 2 ** (bits - 1)).astype(np.uint32).reshape(len(codes), -1, 32 // bits)
    words = np.bitwise_or.reduce(stored << np.arange(0, 32, bits, dtype=np.uint32), axis=-1)
    return words.astype(np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [4, 8])
@given(st.data())
def test_affine_values_are_scale_times_code(bits: int, data: st.DataObject) -> None:
    scales = to_bfloat16(np.array(data.draw(st.lists(NORMAL_SCALES, min_size=1, max_size=4)))[:, None])
    every = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = np.stack([np.roll(every, shift) for shift in range(len(scales))])  # a row a scale, all codes in each
    codes = np.tile(codes, (1, -(-GROUP // len(every))))
    wide = np.repeat(scales, codes.shape[1] // GROUP, axis=1)
    arrays = (mx.array(part).view(mx.bfloat16).astype(mx.float32) for part in (wide, affine_biases(wide, bits)))
    values = mx.dequantize(mx.array(pack(codes, bits).view(np.uint32)), *arrays, group_size=GROUP, bits=bits)
    np.testing.assert_array_equal(np.array(values), from_bfloat16(scales) * codes.astype(np.float32))


@pytest.mark.parametrize(("bits", "factor"), [(4, -8.0), (8, -128.0)])
def test_biases_of_every_bfloat16(bits: int, factor: float) -> None:
    scales = np.arange(2**16, dtype=np.uint16)
    biases = affine_biases(scales, bits)
    assert biases.dtype == np.uint16
    actual = from_bfloat16(biases)
    expected = np.array([float(value) * factor for value in from_bfloat16(scales)])
    is_finite = np.isfinite(expected) & (abs(expected) < 2.0**128)
    np.testing.assert_array_equal(actual[is_finite].astype(np.float64), expected[is_finite])
    np.testing.assert_array_equal(np.signbit(actual[is_finite]), np.signbit(expected[is_finite]))  # also of zero
    overflows = ~is_finite & ~np.isnan(expected)
    np.testing.assert_array_equal(actual[overflows], np.copysign(np.float32(np.inf), expected[overflows]))
    assert np.isnan(actual[np.isnan(expected)]).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_biases_of_other_floats(dtype: type[np.floating]) -> None:
    scales = np.array([[0.0, -0.0, 1.5, -3.0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max]], dtype=dtype)
    biases = affine_biases(scales)
    assert biases.dtype == dtype
    expected = scales.astype(np.float64) * -8
    np.testing.assert_array_equal(biases[:, :-1].astype(np.float64), expected[:, :-1])
    assert np.isneginf(biases[:, -1]).all()
