"""MLX arrays that direct I/O can fill: they begin at a page boundary, and numpy shares their memory."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

ARRAY_ALIGNMENT = 1 << 14
"""Alignment in bytes of an array's memory: the page size of a Mac."""

MAX_DIMENSION = 2**31 - 1


def aligned_array(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an array of zeros whose memory begins at a multiple of ARRAY_ALIGNMENT.

    The array is evaluated, and is a view of a larger buffer, which operations read in place. An array of 2**31 elements
    or more is not aligned, because MLX's dimensions are int32.
    """
    stored, size = mx.uint16 if dtype == mx.bfloat16 else dtype, math.prod(shape)
    if size + ARRAY_ALIGNMENT // stored.size > MAX_DIMENSION:
        array = mx.zeros(shape, dtype)
        mx.eval(array)
        return array
    flat = mx.zeros((size + ARRAY_ALIGNMENT // stored.size,), stored)
    mx.eval(flat)
    start = -_address(np.asarray(flat)) % ARRAY_ALIGNMENT // stored.size
    array = flat[start : start + size].view(dtype).reshape(shape)
    mx.eval(array)
    return array


def shared_view(array: mx.array) -> np.ndarray:
    """Return a numpy view of an evaluated array, bfloat16 as uint16.

    Writing into the view changes the array. Do so only while no computation reads the array.
    """
    view = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    assert not view.flags.owndata
    return view


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
