"""Layout of new safetensors files, and the place of each slice in them.

Source of the format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kimi_mlx.files import write_at
from kimi_mlx.weights.expert_plan import (
    EXPERT_ENTRIES,
    RECORD_ALIGNMENT,
    ExpertArray,
    RecordLayout,
    lay_out_record,
    split_experts,
)
from kimi_mlx.weights.plan import ArrayPlan, LayerPlan, SliceCopy, array_name, as_shape3

ALIGNMENT = 64
"""Alignment in bytes of the start of the data."""

RECORDS_NAME = "mlp.experts"
"""Name of the array of records in a file: U8, (experts, bytes of a record)."""


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
class RecordsLayout:
    """The routed experts of a file as records.

    Args:
        first_expert: number of the first one.
        num_experts: number of experts.
        arrays: arrays of an expert.
        record: layout of a record.
    """

    first_expert: int
    num_experts: int
    arrays: tuple[ExpertArray, ...]
    record: RecordLayout

    @property
    def array(self) -> ArrayPlan:
        """The array of all records."""
        return ArrayPlan(RECORDS_NAME, "U8", (self.num_experts, self.record.record_bytes))

    def offset(self, entry: str, part: int, field: str) -> int:
        """Return the first byte of an array in a record."""
        keys = [(EXPERT_ENTRIES[array.matrix], array.part, array.field) for array in self.arrays]
        return self.record.offsets[keys.index((entry, part, field))]


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
            write_at(handle, view[:length], self.start + member * self.stride + inside)
            view = view[length:]
            offset += length


def lay_out(arrays: Iterable[tuple[str, ArrayPlan]], records: ArrayPlan | None = None) -> FileLayout:
    """Return the layout of consecutive arrays, given with their names in the file.

    Args:
        arrays: names and arrays.
        records: array of records, which follows them at a multiple of RECORD_ALIGNMENT.
    """
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offsets: dict[str, int] = {}
    offset = 0
    all_arrays = [*arrays, *([] if records is None else [(records.name, records)])]
    for name, array in all_arrays:
        offsets[name] = offset
        end = offset + array.size_bytes
        header[name] = {"dtype": array.dtype, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    if records is None:
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
    else:  # the format allows no gaps between arrays
        text += b" " * (-(len(text) + 8 + offsets[records.name]) % RECORD_ALIGNMENT)
    data = 8 + len(text)
    starts = {name: data + start for name, start in offsets.items()}
    return FileLayout(len(text).to_bytes(8, "little") + text, starts, data + offset)


def layer_layout(plan: LayerPlan, has_records: bool = True) -> FileLayout:
    """Return the layout of a layer's file.

    Args:
        plan: arrays of the layer.
        has_records: whether routed experts are stored as records; if not, they are stacks, as in earlier versions.
    """
    records = records_layout(plan) if has_records else None
    if records is None:
        return lay_out(plan.arrays())
    return lay_out(split_experts(plan)[0].arrays(), records.array)


def records_layout(plan: LayerPlan) -> RecordsLayout | None:
    """Return the layout of the records of a layer; None without routed experts."""
    experts = split_experts(plan)[1]
    if experts is None:
        return None
    return RecordsLayout(experts.first_expert, experts.num_experts, experts.arrays, lay_out_record(experts.arrays))


def file_regions(plan: LayerPlan, file: int, has_records: bool = True) -> Iterator[tuple[SliceCopy, FileRegion]]:
    """Yield each slice of a layer, and its location in file number `file`.

    The order of the slices does not depend on `has_records`.
    """
    layout = layer_layout(plan, has_records)
    records = records_layout(plan) if has_records else None
    for entry, parts in plan.entries.items():
        for number, part in enumerate(parts):
            for array in part.arrays:
                name = array_name(entry, number, len(parts), array.name)
                if records is None or entry not in EXPERT_ENTRIES.values():
                    for copy in array.copies:
                        yield copy, _copy_region(layout.starts[name], array, copy, file)
                    continue
                in_record = layout.starts[RECORDS_NAME] + records.offset(entry, number, array.name)
                stride = records.record.record_bytes
                for copy in array.copies:
                    if copy.member < records.num_experts:
                        region = _copy_region(0, array, replace(copy, member=0), file)
                        start = in_record + copy.member * stride + region.start
                        yield copy, replace(region, start=start, stride=stride)
                    else:
                        shared = replace(copy, member=copy.member - records.num_experts)
                        yield copy, _copy_region(layout.starts[name], array, shared, file)


def moves_into_records(plan: LayerPlan) -> Iterator[tuple[int, int, int]]:
    """Yield the contiguous parts of a layer's file with stacks: first byte, number of bytes, first byte with records.

    Args:
        plan: arrays of the layer, which has routed experts. Their copies are not used.
    """
    old, new, records = layer_layout(plan, has_records=False), layer_layout(plan), records_layout(plan)
    assert records is not None
    for entry, parts in plan.entries.items():
        for number, part in enumerate(parts):
            for array in part.arrays:
                name = array_name(entry, number, len(parts), array.name)
                start, stop = old.starts[name], old.starts[name] + array.size_bytes
                if entry in EXPERT_ENTRIES.values():
                    in_record = new.starts[RECORDS_NAME] + records.offset(entry, number, array.name)
                    member_bytes = array.size_bytes // array.shape[0]
                    for index in range(records.num_experts):
                        yield start, member_bytes, in_record + index * records.record.record_bytes
                        start += member_bytes
                if stop > start:  # not of routed experts
                    yield start, stop - start, new.starts[name]


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


def _copy_region(start: int, array: ArrayPlan, copy: SliceCopy, file: int) -> FileRegion:
    return region_of(start, array, copy.member, copy.row, copy.shape[1], file)
