"""Packed integers, the format of the experts of K2-Thinking and K2.5, read as MLX's affine layout. Pure numpy.

Format: `pack-quantized` of compressed-tensors, symmetric, in groups along the columns, for a matrix (rows, columns):

    weight_packed   int32 (rows, columns * bits / 32): 32 / bits values per word, the first in the lowest bits,
                    each stored as q + 2**(bits - 1), which is in 0 .. 2**bits - 1
    weight_scale    (rows, columns / group_size), bfloat16: the value is scale * q

MLX's affine layout packs the same way into uint32; a value is scale * stored + bias. With bias = -2**(bits - 1) * scale
(-8 * scale for 4 bits) that is scale * (q + 8) - 8 * scale = scale * q. Nothing is lost: the packed words do not
change, and a product with a power of two only changes sign and exponent, which is exact in every float type unless it
overflows (above 2**124 in bfloat16, 2**12 in float16).

Sources: compressed-tensors 0.20, `compressors/pack_quantized/helpers.py: pack_to_int32`; MLX's `mx.quantize`.
"""

from __future__ import annotations

import numpy as np

BFLOAT16 = np.uint16
"""Type that stands for bfloat16, which numpy lacks: its bits are the upper half of a float32."""


def affine_biases(scales: np.ndarray, bits: int = 4) -> np.ndarray:
    """Return MLX's biases for symmetric scales: -2**(bits - 1) * scale.

    Args:
        scales: bfloat16 bits as uint16, or float16, or float32.
        bits: bits per value: 4 or 8; MLX packs other widths differently.

    Returns:
        Biases of the same shape and type; exact, and infinite on overflow.
    """
    assert bits in (4, 8)
    factor = np.float32(-(2 ** (bits - 1)))
    with np.errstate(over="ignore", invalid="ignore"):  # infinities; NaN stays NaN
        if scales.dtype == BFLOAT16:
            # a bfloat16 is the upper half of a float32, and the product leaves the lower half 0
            wide = (scales.astype(np.uint32) << 16).view(np.float32) * factor
            return (wide.view(np.uint32) >> 16).astype(BFLOAT16)
        return scales * scales.dtype.type(factor)
