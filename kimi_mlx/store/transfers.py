"""What is taken of one source file and where it goes: parcels, in an order that every process computes alike.

What a parcel holds travels as one row of bytes, in the order of C; pieces of it can be written anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kimi_mlx.store.writer import FileRegion, file_regions
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.layer_plan import LayerPlan, SliceCopy

PIECE_BYTES = 1 << 24


@dataclass(frozen=True)
class SliceTransfer:
    """A slice, and the ranks that need it.

    Args:
        move: what is taken.
        size_bytes: of it.
        targets: for each rank where it goes.
    """

    move: SliceCopy
    size_bytes: int
    targets: dict[int, FileRegion] = field(default_factory=dict[int, FileRegion])


Plans = Callable[[int, int], LayerPlan]
"""(rank, file of the store) -> its plan."""


def slice_transfers(
    source: Path,
    checkpoint: Checkpoint,
    plans: Plans,
    wanted: Mapping[int, Sequence[int]],
) -> list[SliceTransfer]:
    """The parcels of a source file.

    Args:
        source: the file, as the checkpoint's table names it.
        checkpoint: the table.
        plans: of all ranks.
        wanted: for each rank the files of its store that lack something of this source.
    """
    found: dict[object, SliceTransfer] = {}
    for rank, files in wanted.items():
        for file in files:
            for move, place in file_regions(plans(rank, file), file):
                if checkpoint.tensors[move.field.tensors[0]].file == source:
                    key = (move.field.name, move.field.tensors, move.window)
                    parcel = found.get(key)
                    if parcel is None:
                        size = move.box[0] * place.member_bytes
                        parcel = found[key] = SliceTransfer(move, size)
                    parcel.targets[rank] = place
    return list(found.values())


def split_into_chunks(part: np.ndarray, limit_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a slice into pieces that lie in one row of bytes; yields (offset, bytes).

    Args:
        part: (members, rows, columns), any strides.
        limit_bytes: of a piece, unless one row is longer.
    """
    _, rows, columns = part.shape
    step = max(1, limit_bytes // max(columns * part.itemsize, 1))
    offset = 0
    for member in part:
        for row in range(0, rows, step):
            piece = np.ascontiguousarray(member[row : row + step]).reshape(-1).view(np.uint8)
            yield offset, piece
            offset += piece.nbytes
