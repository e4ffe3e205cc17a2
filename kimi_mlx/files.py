"""Atomic file writes, and checksums."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 22


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary file next to `path`, flush it and rename it. Readers see the old file or the new one."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write the same
    try:
        with part.open("wb") as file:
            file.write(data)
        rename_durably(part, path)
    finally:
        part.unlink(missing_ok=True)


def rename_durably(source: Path, target: Path) -> None:
    """Flush a file, rename it, and flush the folder, so that the complete file survives a power failure."""
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
    """Return a file's SHA-256 in hexadecimal. `progress` is called with the number of newly read bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def is_disk_full(error: OSError) -> bool:
    """Whether an error means that the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)
