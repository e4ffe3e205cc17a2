"""Slices of a source file and the ranks that need them. All processes compute the same list in the same order.

The bytes of a slice are sent in C order, so that each chunk can be written as it arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.file_layout import FileRegion, file_regions
from kimi_mlx.weights.plan import LayerPlan, SliceCopy

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class SliceTransfer:
    """A slice, and the ranks that need it.

    Args:
        slice_copy: slice of a source tensor.
        size_bytes: bytes of the slice.
        regions: rank -> location of the slice in the rank's store.
    """

    slice_copy: SliceCopy
    size_bytes: int
    regions: dict[int, FileRegion] = field(default_factory=dict[int, FileRegion])


PlanOfFile = Callable[[int, int], LayerPlan]
"""Function: (rank, number of a store file) -> plan of the file."""


def slice_transfers(
    source: Path,
    checkpoint: Checkpoint,
    plan_of_file: PlanOfFile,
    missing_files: Mapping[int, Sequence[int]],
    has_records: Callable[[int, int], bool] = lambda rank, file: True,
) -> list[SliceTransfer]:
    """Return the slices that are taken from a source file.

    Args:
        source: path of the source file in the checkpoint's table.
        checkpoint: table of all tensors.
        plan_of_file: plans of all store files of all ranks.
        missing_files: rank -> store files that still need slices of this source file.
        has_records: function: (rank, number of a store file) -> whether its experts are written as records. The slices
            and their order do not depend on it, only their locations.
    """
    transfers: dict[object, SliceTransfer] = {}
    for rank, files in missing_files.items():
        for file in files:
            for copy, region in file_regions(plan_of_file(rank, file), file, has_records(rank, file)):
                if checkpoint.tensors[copy.field.tensors[0]].file == source:
                    key = (copy.field.name, copy.field.tensors, copy.tensor_slice)
                    if key not in transfers:
                        transfers[key] = SliceTransfer(copy, copy.shape[0] * region.member_bytes)
                    transfers[key].regions[rank] = region
    return list(transfers.values())


def split_into_chunks(part: np.ndarray, limit_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, np.ndarray]]:
    """Split a slice into contiguous chunks; yield (offset, bytes).

    Args:
        part: (members, rows, columns), any strides.
        limit_bytes: maximum size of a chunk, unless one row is longer.
    """
    _, rows, columns = part.shape
    step = max(1, limit_bytes // max(columns * part.itemsize, 1))
    offset = 0
    for member in part:
        for row in range(0, rows, step):
            chunk = np.ascontiguousarray(member[row : row + step]).reshape(-1).view(np.uint8)
            yield offset, chunk
            offset += chunk.nbytes
