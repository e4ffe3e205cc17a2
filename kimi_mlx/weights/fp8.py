"""FP8 weights in blocks, the format of Kimi K2 and K2-0905: decode bytes and scales to float32. Pure numpy.

A matrix `weight` of 8-bit floats, e4m3fn (sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, 0x7f and
0xff are NaN), comes with `weight_scale_inv`, one float32 per block of `weight_block_size` (128 x 128) values. The last
block of an axis may be partial: 576 rows have 5 blocks.

    value[i, j] = e4m3fn(weight[i, j]) * weight_scale_inv[i // block_rows, j // block_columns]

Sources: "FP8 Formats for Deep Learning" (https://arxiv.org/abs/2209.05433) for e4m3fn; DeepSeek-V3's published code,
`inference/kernel.py: weight_dequant`, for the scales, which despite their name are multiplied.
"""

from __future__ import annotations

import numpy as np

ALL = slice(None)


def _e4m3fn_table() -> np.ndarray:
    """Return the values of the 256 codes: (256,) float32."""
    codes = np.arange(256)
    exponents, mantissas = codes >> 3 & 15, codes & 7
    is_normal = exponents > 0
    magnitudes = np.ldexp((is_normal * 8 + mantissas).astype(np.float32), np.maximum(exponents, 1) - 10)
    magnitudes[codes & 127 == 127] = np.nan
    return np.where(codes < 128, magnitudes, -magnitudes)


E4M3FN = _e4m3fn_table()
"""Value of each code: (256,) float32."""


def decode(
    weight: np.ndarray,
    scale_inv: np.ndarray,
    block: tuple[int, int],
    rows: slice = ALL,
    columns: slice = ALL,
) -> np.ndarray:
    """Decode a window of a matrix or of a stack of matrices; reads only the window of `weight`.

    Memory: the result, and one row of blocks of one matrix; `weight` may be a memory map of any size.

    Args:
        weight: (..., rows, columns) uint8.
        scale_inv: (..., ceil(rows / block_rows), ceil(columns / block_columns)) float32.
        block: (rows, columns) of a block.
        rows: rows of the window, without step; need not be aligned to blocks.
        columns: columns of the window, likewise.

    Returns:
        The window: (..., rows, columns) float32, contiguous.
    """
    *leading, height, width = weight.shape
    block_rows, block_columns = block
    assert scale_inv.shape == (*leading, -(-height // block_rows), -(-width // block_columns))
    first, end = _bounds(rows, height)
    left, right = _bounds(columns, width)
    block_of_column = np.arange(left, right) // block_columns
    decoded = np.empty((*leading, end - first, right - left), dtype=np.float32)
    for member in np.ndindex(*leading):
        for index in range(first // block_rows, -(-end // block_rows)):
            start, stop = max(first, index * block_rows), min(end, (index + 1) * block_rows)
            strip = decoded[(*member, slice(start - first, stop - first))]
            codes = weight[(*member, slice(start, stop), slice(left, right))]
            np.take(E4M3FN, codes, out=strip, mode="clip")  # the default mode would buffer `out`
            strip *= scale_inv[(*member, index)][block_of_column]
    return decoded


def _bounds(window: slice, extent: int) -> tuple[int, int]:
    """Return the first and end index of a window; both are equal if it is empty."""
    first, end, step = window.indices(extent)
    assert step == 1
    return first, max(first, end)
