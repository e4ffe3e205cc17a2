"""Locations of slices in the files of a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kimi_mlx.weights.file_layout import FileLayout, lay_out
from kimi_mlx.weights.layer_plan import LayerPlan, SliceCopy, as_shape3


@dataclass(frozen=True)
class FileRegion:
    """Location of a slice in a file of a store.

    Args:
        file: number of the layer; the top follows the last layer.
        start: first byte of the first member.
        stride: bytes from one member to the next.
        member_bytes: bytes of one member, which is contiguous.
    """

    file: int
    start: int
    stride: int
    member_bytes: int


def layer_layout(plan: LayerPlan) -> FileLayout:
    """Return the layout of a layer's file."""
    return lay_out((name, array.dtype, array.shape) for name, array in plan.arrays())


def file_regions(plan: LayerPlan, file: int) -> Iterator[tuple[SliceCopy, FileRegion]]:
    """Yield each slice of a layer, and its location in file number `file`."""
    layout = layer_layout(plan)
    for name, array in plan.arrays():
        members, rows, columns = as_shape3(array.shape)
        row_bytes = array.size_bytes // max(members * rows, 1)
        assert row_bytes % max(columns, 1) == 0
        for copy in array.copies:
            start = layout.starts[name] + (copy.member * rows + copy.row) * row_bytes
            yield copy, FileRegion(file, start, rows * row_bytes, copy.shape[1] * row_bytes)
