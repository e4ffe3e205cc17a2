"""Arrays of MLX into which a disk can write directly: they begin at a page, and numpy sees the same memory."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

ARRAY_ALIGNMENT = 1 << 14
"""Alignment in bytes of an array's memory: the page size of a Mac."""

MAX_DIMENSION = 2**31 - 1


def aligned_array(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return an array of zeros whose memory begins at a multiple of ARRAY_ALIGNMENT.

    It is a part of a larger buffer, and is evaluated. Operations on it read it in place. An array of 2**31 elements or
    more is not aligned: MLX's dimensions are int32.
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
    """Return an evaluated array as numpy: the same memory, bfloat16 as uint16.

    Writing into it changes the array. No computation that reads the array may be under way then.
    """
    view = np.asarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
    assert not view.flags.owndata
    return view


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
