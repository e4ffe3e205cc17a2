"""Weights in memory: float matrices, or MLX's quantization of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from kimi_mlx.model.config_quantization import Quantization


@dataclass(frozen=True)
class Weight:
    """One matrix, or a stack of matrices.

    Args:
        weight: (..., rows, columns) float, or (..., rows, columns * bits / 32) uint32 if quantized.
        scales: (..., rows, columns / group_size), only if quantized; uint8 in modes other than affine.
        biases: same shape as scales, only in affine mode.
        quantization: bits, group size and mode, None for a float weight.
        dtype: compute dtype, to which the values are dequantized.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    quantization: Quantization | None = None
    dtype: mx.Dtype = mx.float32

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.weight.shape[-2]

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate."""
        return [array for array in (self.weight, self.scales, self.biases) if array is not None]


class Matrix(nn.Module):
    """A weight as a module: its arrays are parameters, its quantization is not.

    Base class of Linear, Embedding and the stacked matrices of heads and experts.
    """

    def __init__(self, source: Weight):
        super().__init__()
        self.weight = source.weight
        if source.scales is not None:
            self.scales = source.scales
        if source.biases is not None:
            self.biases = source.biases
        self.quantization = source.quantization

    @property
    def rows(self) -> int:
        """Number of outputs (of each matrix of a stack)."""
        return self["weight"].shape[-2]

    @property
    def columns(self) -> int:
        """Number of inputs (of each matrix of a stack)."""
        stored = self["weight"].shape[-1]
        return stored if self.quantization is None else stored * 32 // self.quantization.bits

    def matmul(self, x: mx.array, transpose: bool = True, stack: slice | None = None) -> mx.array:
        """Return x @ weight.T, or x @ weight; leading dimensions broadcast. `stack` selects matrices of a stack.

        Of a single matrix it selects rows.
        """
        weight = self["weight"] if stack is None else self["weight"][stack]
        if self.quantization is None:
            return x @ (weight.swapaxes(-1, -2) if transpose else weight)
        scales, biases = self["scales"], self.get("biases")
        if stack is not None:
            scales, biases = scales[stack], None if biases is None else biases[stack]
        return mx.quantized_matmul(x, weight, scales, biases, transpose=transpose, **self.quantization.arguments)

    def gather_matmul(self, x: mx.array, ids: mx.array, inputs: mx.array | None = None) -> mx.array:
        """Return x[inputs] @ weight[ids].T for a stack of matrices.

        Args:
            x: (..., 1, columns).
            ids: (...) uint32, indices into the stack.
            inputs: (...) uint32, indices into x's leading dimensions, broadcast against ids. None if x has one row for
                each id and ids ascend, so that MLX reads each matrix once.
        """
        is_sorted = inputs is None
        if self.quantization is None:
            return mx.gather_mm(x, self["weight"].swapaxes(-1, -2), inputs, ids, sorted_indices=is_sorted)
        return mx.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            lhs_indices=inputs,
            rhs_indices=ids,
            transpose=True,
            sorted_indices=is_sorted,
            **self.quantization.arguments,
        )


class Linear(Matrix):
    """y = x @ weight.T, without bias."""

    def __call__(self, x: mx.array) -> mx.array:
        """(..., columns) -> (..., rows)."""
        return self.matmul(x)

    def some_rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        """Return the outputs from start to stop (excluded): (..., columns) -> (..., stop - start)."""
        return self.matmul(x, stack=slice(start, stop))


class ConcatLinear(nn.Module):
    """Matrices with the same input and concatenated outputs, for parts that are quantized differently."""

    def __init__(self, parts: Sequence[Weight]):
        super().__init__()
        self.parts = [Linear(part) for part in parts]

    def __call__(self, x: mx.array) -> mx.array:
        """(..., columns) -> (..., sum of rows)."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)

    def some_rows(self, x: mx.array, start: int, stop: int) -> mx.array:
        """Same as Linear.some_rows."""
        outputs: list[mx.array] = []
        first = 0
        for part in self.parts:
            begin, end = max(start - first, 0), min(stop - first, part.rows)
            if begin < end:
                outputs.append(part.some_rows(x, begin, end))
            first += part.rows
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=-1)

    def gather_matmul(self, x: mx.array, ids: mx.array, inputs: mx.array | None = None) -> mx.array:
        """Same as Matrix.gather_matmul, with the outputs of all parts concatenated."""
        return mx.concatenate([part.gather_matmul(x, ids, inputs) for part in self.parts], axis=-1)


def linear(parts: Sequence[Weight]) -> Linear | ConcatLinear:
    """Return the module of a fused weight: one matrix, or several if they are quantized differently."""
    return Linear(parts[0]) if len(parts) == 1 else ConcatLinear(parts)


class Embedding(Matrix):
    """Rows of a matrix, which may be quantized, by token id."""

    def __init__(self, source: Weight):
        super().__init__(source)
        self.dtype = source.dtype

    def __call__(self, ids: mx.array) -> mx.array:
        """(...) integers -> (..., columns)."""
        rows = self["weight"][ids]
        if self.quantization is None:
            return rows
        biases = self["biases"][ids] if "biases" in self else None
        return mx.dequantize(rows, self["scales"][ids], biases, dtype=self.dtype, **self.quantization.arguments)
