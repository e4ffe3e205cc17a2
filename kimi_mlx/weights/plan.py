"""Plans of weights as data: arrays, and the slices of stored tensors that fill them.

Loading a checkpoint, building a store and converting all carry out these plans: they copy the slices into memory or
into files. A conversion quantizes some of them again. This module reads no tensor: numpy is used for shapes and views.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import SourceMatrix
from kimi_mlx.parallel.placement import Range
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.matrix_format import MatrixField, Packing

Shape3 = tuple[int, int, int]
"""(members of a stack, rows, columns); a plain matrix is a stack of one, a norm has one row."""


@dataclass(frozen=True)
class TensorSlice:
    """A slice of a stored matrix. Ranges count elements of the unquantized matrix; None takes all.

    Args:
        source: matrix, whose heads and blocks define the stack.
        packing: packing of the stored columns.
        stack: members of a matrix that is stored as a stack or becomes one by heads.
        rows: rows of each member.
        columns: columns of each row.
    """

    source: SourceMatrix
    packing: Packing
    stack: Range | None = None
    rows: Range | None = None
    columns: Range | None = None

    def view(self, array: np.ndarray) -> np.ndarray:
        """Return the slice of a stored matrix (..., rows, columns), or of a norm, as a view."""
        return self._slice_axes(self._split_blocks(self._split_heads(array)))

    def shape3(self, stored_shape: tuple[int, ...]) -> Shape3:
        """Return the shape of the slice, as a stack."""
        return as_shape3(self.view(np.broadcast_to(np.uint8(0), stored_shape)).shape)

    def _split_heads(self, array: np.ndarray) -> np.ndarray:
        if self.source.heads is None:
            return array
        heads, first, end = self.source.heads
        return array.reshape(heads, -1, array.shape[-1])[:, first:end]

    def _split_blocks(self, array: np.ndarray) -> np.ndarray:
        """Turn concatenated shared experts into a stack: (S, rows, columns)."""
        source = self.source
        if not source.blocks:
            return array
        if source.sharded_axes[0].axis == "rows":
            return array.reshape(source.blocks, -1, array.shape[-1])
        return array.reshape(array.shape[0], source.blocks, -1).swapaxes(0, 1)

    def _slice_axes(self, array: np.ndarray) -> np.ndarray:
        if self.stack is not None:
            array = array[self.stack.start : self.stack.stop]
        if self.rows is not None:
            array = array[..., self.rows.start : self.rows.stop, :]
        if self.columns is not None:
            start, stop = map(self.packing.stored_columns, (self.columns.start, self.columns.stop))
            array = array[..., start:stop]
        return array


@dataclass(frozen=True)
class SliceCopy:
    """Copy of one slice into an array.

    Args:
        field: stored form of the slice's tensor.
        tensor_slice: the slice.
        shape: shape of the slice.
        member: first member in the destination.
        row: first row in the destination.
    """

    field: MatrixField
    tensor_slice: TensorSlice
    shape: Shape3
    member: int
    row: int

    def part(self, members: Range, rows: Range) -> SliceCopy:
        """Return the copy of some members, and of some rows of each, counted from the start of the slice."""
        stack, height = self.tensor_slice.stack, self.tensor_slice.rows
        first_member, first_row = (0 if span is None else span.start for span in (stack, height))
        part = replace(
            self.tensor_slice,
            stack=_shift(members, first_member) if len(members) < self.shape[0] else stack,
            rows=_shift(rows, first_row) if len(rows) < self.shape[1] else height,
        )
        shape = (len(members), len(rows), self.shape[2])
        return replace(
            self, tensor_slice=part, shape=shape, member=self.member + members.start, row=self.row + rows.start
        )


@dataclass(frozen=True)
class ArrayPlan:
    """An array in memory or in a file.

    Args:
        name: `weight`, `scales` or `biases`.
        dtype: type as safetensors names it.
        shape: (..., rows, columns), or (extent,).
        copies: copies that fill the array; together they cover it exactly once. Empty if a conversion computes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    copies: tuple[SliceCopy, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class WeightPlan:
    """Arrays and quantization of one weight."""

    arrays: tuple[ArrayPlan, ...]
    quantization: Quantization | None

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.size_bytes for array in self.arrays)


@dataclass(frozen=True)
class LayerPlan:
    """A rank's weights of a layer, or of the top.

    Args:
        entries: name -> parts of the weight; more than one if fused matrices have different quantizations.
        latent_first: see kimi_mlx.model.tree.LayerWeights.
        num_fused_shared: see there.
        first_expert: see there.
    """

    entries: dict[str, tuple[WeightPlan, ...]]
    latent_first: bool = False
    num_fused_shared: int = 0
    first_expert: int = 0

    def arrays(self) -> Iterator[tuple[str, ArrayPlan]]:
        """Yield all arrays with their names in a store."""
        for entry, parts in self.entries.items():
            for number, part in enumerate(parts):
                for array in part.arrays:
                    yield array_name(entry, number, len(parts), array.name), array

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.size_bytes for _, array in self.arrays())


def array_name(entry: str, part: int, num_parts: int, array: str) -> str:
    """Return the name of an array in a store, such as `self_attn.o_proj.scales`."""
    return f"{entry}.{array}" if num_parts == 1 else f"{entry}.{part}.{array}"


def as_shape3(shape: tuple[int, ...]) -> Shape3:
    """Return a shape as (members, rows, columns); with more than three axes it is one of rows of all further axes."""
    if len(shape) > 3:
        shape = (shape[0], math.prod(shape[1:]))
    members, rows, columns = (1,) * (3 - len(shape)) + tuple(shape)
    return members, rows, columns


def _shift(span: Range, offset: int) -> Range:
    return Range(span.start + offset, span.stop + offset)
