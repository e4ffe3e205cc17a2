"""Files that are there as a whole or not at all, and their checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

PIECE_BYTES = 1 << 22


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path`, flush to the disk and rename; a reader sees the old file or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write the same
    try:
        with part.open("wb") as file:
            file.write(data)
        rename_durably(part, path)
    finally:
        part.unlink(missing_ok=True)


def rename_durably(source: Path, target: Path) -> None:
    """Flush a file, rename it, and flush the folder, so that the new name survives a power cut with all of the file."""
    _flush(source)
    os.replace(source, target)
    with contextlib.suppress(OSError):  # some file systems cannot do this for folders
        _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path, progress: Callable[[int], None] = lambda delta: None) -> str:
    """The checksum of a file, in hexadecimal; `progress` gets the bytes read since its last call."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that there is no more space (or quota)."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
