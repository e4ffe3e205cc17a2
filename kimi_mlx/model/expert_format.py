"""Shapes and types of the arrays of one routed expert in memory, for experts that are read from disk on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import mlx.core as mx

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.weight import ConcatLinear, Linear, Matrix, Weight, linear


@dataclass(frozen=True)
class ArrayFormat:
    """An array of one expert.

    Args:
        shape: shape, without the axis of experts.
        dtype: type in memory.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True)
class MatrixFormat:
    """A matrix of one expert.

    Args:
        arrays: weight, then scales and biases if it has them.
        quantization: quantization of the matrix; None for floats.
        dtype: compute dtype.
    """

    arrays: tuple[ArrayFormat, ...]
    quantization: Quantization | None
    dtype: mx.Dtype

    @classmethod
    def of(cls, stack: Weight) -> MatrixFormat:
        """Return the format of the members of a stack of experts."""
        arrays = tuple(ArrayFormat(tuple(array.shape[1:]), array.dtype) for array in stack.arrays)
        return cls(arrays, stack.quantization, stack.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def columns(self) -> int:
        """Number of inputs."""
        stored = self.arrays[0].shape[-1]
        return stored if self.quantization is None else stored * 32 // self.quantization.bits

    def weight(self, stacks: Sequence[mx.array]) -> Weight:
        """Return the weight of a stack of experts.

        Args:
            stacks: stack of each of `arrays`, (experts, *shape).
        """
        return Weight(*stacks, quantization=self.quantization, dtype=self.dtype)


@dataclass(frozen=True)
class ExpertFormat:
    """The matrices of one routed expert on this rank.

    Args:
        gate_up: parts of mlp.experts.gate_up_proj, in the order of kimi_mlx.model.tree.
        down: mlp.experts.down_proj.
    """

    gate_up: tuple[MatrixFormat, ...]
    down: MatrixFormat

    @property
    def arrays(self) -> tuple[ArrayFormat, ...]:
        """All arrays: those of the parts of gate_up, then those of down, each in the order weight, scales, biases."""
        return tuple(array for matrix in (*self.gate_up, self.down) for array in matrix.arrays)

    @property
    def num_bytes(self) -> int:
        """Bytes of one expert in memory."""
        return sum(array.num_bytes for array in self.arrays)

    def modules(self, stacks: Sequence[mx.array]) -> tuple[Linear | ConcatLinear, Matrix]:
        """Return gate_up_proj and down_proj of a stack of experts.

        Args:
            stacks: stack of each of `arrays`, (experts, *shape).
        """
        remaining = iter(stacks)
        gate_up = [matrix.weight(_take(remaining, len(matrix.arrays))) for matrix in self.gate_up]
        return linear(gate_up), Matrix(self.down.weight(_take(remaining, len(self.down.arrays))))


@dataclass(frozen=True)
class RoutedExperts:
    """The routed experts of a layer that this rank reads from disk.

    Args:
        format: format of each expert.
        num_experts: number of routed experts on this rank; the first one is LayerWeights.first_expert.
        stored_bytes: bytes that reading one expert takes from the disk.
    """

    format: ExpertFormat
    num_experts: int
    stored_bytes: int


def _take(arrays: Iterator[mx.array], count: int) -> list[mx.array]:
    return [next(arrays) for _ in range(count)]
