"""Results of a worker process with large arrays, which pass through a file.

Through a pipe, the event loop would copy the patches of images several times: 40 large images are 400 MB, and nothing
else would run for a second. A file is mapped without a copy.
"""

from __future__ import annotations

import itertools
import mmap
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PackedResult:
    """A result as bytes, with its arrays in a file.

    Args:
        data: pickled result without the arrays.
        sizes: sizes of the arrays in bytes, in the order of the file.
    """

    data: bytes
    sizes: tuple[int, ...]


def pack(result: object, path: Path) -> PackedResult:
    """Return a result as bytes, and write its arrays to a file, if it has any.

    Args:
        result: result; it can be pickled.
        path: path of the file, which does not exist yet.

    Raises:
        OSError: the file cannot be written.
    """
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(result, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    if arrays:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "wb") as file:
            file.writelines(arrays)
    return PackedResult(data, tuple(array.nbytes for array in arrays))


def unpack(packed: PackedResult, path: Path) -> Any:
    """Return the result. Its arrays are read-only and stay valid when the file is removed."""
    if not packed.sizes:
        return pickle.loads(packed.data)
    with open(path, "rb") as file:
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    ends = itertools.accumulate(packed.sizes)
    arrays = [content[end - size : end] for end, size in zip(ends, packed.sizes, strict=True)]
    return pickle.loads(packed.data, buffers=arrays)
