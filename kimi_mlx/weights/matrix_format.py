"""Stored formats of matrices: which tensors a matrix has, and how they become arrays of the canonical form.

Formats are recognized by the names of the tensors, not by `config.json`:

    weight                                         floats
    weight, scales, biases                         MLX's affine quantization
    weight, scales                                 MLX's other modes: mxfp4, mxfp8, nvfp4
    weight, weight_scale_inv                       FP8 blocks (kimi_mlx.weights.fp8)
    weight_packed, weight_scale, weight_shape      packed integers (kimi_mlx.weights.packed_int4)
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Literal

from kimi_mlx.model.config_quantization import Quantization

FLOATS = ("F32", "F16", "BF16")
"""Types in which scales, norms and unquantized matrices may be stored."""


@dataclass(frozen=True)
class Packing:
    """Ratio of the columns of a stored array to those of the unquantized matrix.

    Every `values` columns of the matrix take `stored` columns. In packed weights 32 columns take `bits`, in scales and
    biases `group_size` columns take 1.
    """

    stored: int = 1
    values: int = 1

    def divides(self, columns: int) -> bool:
        """Return whether this number of columns is stored as a whole number of columns."""
        return columns * self.stored % self.values == 0

    def stored_columns(self, columns: int) -> int:
        """Return the number of stored columns."""
        return columns * self.stored // self.values

    def columns(self, stored_columns: int) -> int:
        """Return the number of columns of the unquantized matrix."""
        return stored_columns * self.values // self.stored


NOT_PACKED = Packing()


@dataclass(frozen=True)
class MatrixField:
    """One array of a matrix in the canonical form, and its stored tensors.

    Args:
        name: `weight`, `scales` or `biases`.
        dtype: type in the canonical form, as safetensors names it.
        tensors: stored tensors; only `fp8` and `dequantize` need more than one.
        decode: conversion of the tensors into the array: `copy`, `biases` (computed from the scales of packed
            integers), `fp8`, `dequantize` (a weight that the model needs as floats), or `channels_last` (a convolution
            whose channels are moved from the last axis to the second).
        packing: packing of the columns.
        quantized: for `dequantize`, the format of the stored matrix.
    """

    name: str
    dtype: str
    tensors: tuple[str, ...]
    decode: Literal["copy", "biases", "fp8", "dequantize", "channels_last"] = "copy"
    packing: Packing = NOT_PACKED
    quantized: MatrixFormat | None = None


@dataclass(frozen=True)
class MatrixFormat:
    """Stored format of one matrix of the checkpoint.

    Args:
        fields: `weight`, and `scales` and `biases` if quantized.
        quantization: quantization in the canonical form; None if float.
    """

    fields: tuple[MatrixField, ...]
    quantization: Quantization | None

    @property
    def kind(self) -> tuple[tuple[str, ...], Quantization | None]:
        """Types and quantization; two matrices can be joined only if theirs are equal."""
        return tuple(field.dtype for field in self.fields), self.quantization

    def dequantized(self) -> MatrixFormat:
        """Return the format that decodes a quantized matrix to float32."""
        tensors = tuple(dict.fromkeys(name for field in self.fields for name in field.tensors))
        return MatrixFormat((MatrixField("weight", "F32", tensors, "dequantize", quantized=self),), None)


def tensor_names(present: Container[str], path: str, suffix: str = ".weight") -> tuple[str, ...]:
    """Return the names of the tensors of the matrix at `path`.

    Args:
        present: names of all tensors.
        path: name without suffix.
        suffix: `.weight`, or the suffix of the router's bias, which has one format only.
    """
    kinds: tuple[str, ...] = ("weight",)
    if suffix != ".weight":
        return (path + suffix,)
    if f"{path}.weight_packed" in present:
        kinds = ("weight_packed", "weight_scale", "weight_shape")
    elif f"{path}.weight_scale_inv" in present:
        kinds = ("weight", "weight_scale_inv")
    elif f"{path}.biases" in present:
        kinds = ("weight", "scales", "biases")
    elif f"{path}.scales" in present:
        kinds = ("weight", "scales")
    return tuple(f"{path}.{kind}" for kind in kinds)
