"""Layout of new safetensors files, and the place of each slice in them.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from kimi_mlx.weights.plan import ArrayPlan, LayerPlan, SliceCopy, as_shape3

ALIGNMENT = 64
"""Alignment in bytes of the start of the data."""


@dataclass(frozen=True)
class FileLayout:
    """Layout of one file.

    Args:
        header: first bytes of the file.
        starts: name of an array -> its first byte.
        size_bytes: size of the whole file.
    """

    header: bytes
    starts: dict[str, int]
    size_bytes: int


@dataclass(frozen=True)
class FileRegion:
    """Location of a slice in a file.

    Args:
        file: number of the file in a store: that of the layer; the top follows the last layer.
        start: first byte of the first member.
        stride: bytes from one member to the next.
        member_bytes: bytes of one member, which is contiguous.
    """

    file: int
    start: int
    stride: int
    member_bytes: int

    def write(self, handle: int, offset: int, data: np.ndarray) -> None:
        """Write a chunk of the slice into the open file.

        Args:
            handle: file descriptor.
            offset: first byte of the chunk within the slice.
            data: (bytes,) uint8.

        Raises:
            OSError: the disk is full or fails.
        """
        view = data.data
        while view:
            member, inside = divmod(offset, self.member_bytes)
            length = min(len(view), self.member_bytes - inside)
            written = os.pwrite(handle, view[:length], self.start + member * self.stride + inside)
            view = view[written:]
            offset += written


def lay_out(arrays: Iterable[tuple[str, ArrayPlan]]) -> FileLayout:
    """Return the layout of consecutive arrays, given with their names in the file."""
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    offset = 0
    for name, array in arrays:
        offsets[name] = offset
        end = offset + array.size_bytes
        header[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    data = 8 + len(text)
    starts = {name: data + start for name, start in offsets.items()}
    return FileLayout(len(text).to_bytes(8, "little") + text, starts, data + offset)


def layer_layout(plan: LayerPlan) -> FileLayout:
    """Return the layout of a layer's file."""
    return lay_out(plan.arrays())


def file_regions(plan: LayerPlan, file: int) -> Iterator[tuple[SliceCopy, FileRegion]]:
    """Yield each slice of a layer, and its location in file number `file`."""
    layout = layer_layout(plan)
    for name, array in plan.arrays():
        for copy in array.copies:
            yield copy, region_of(layout.starts[name], array, copy.member, copy.row, copy.shape[1], file)


def region_of(start: int, array: ArrayPlan, member: int, row: int, num_rows: int, file: int = 0) -> FileRegion:
    """Return the location of some rows of some members of an array.

    Args:
        start: first byte of the array in the file.
        array: the array.
        member: first member.
        row: first row of each member.
        num_rows: number of rows of each member.
        file: number of the file in a store.
    """
    members, rows, columns = as_shape3(array.shape)
    row_bytes = array.size_bytes // max(members * rows, 1)
    assert row_bytes % max(columns, 1) == 0
    return FileRegion(file, start + (member * rows + row) * row_bytes, rows * row_bytes, num_rows * row_bytes)
