"""Atomic file writes, checksums, and free disk space."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

CHUNK_BYTES = 1 << 22

FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
"""Kinds of entries of a folder that cannot be read like a file."""


def irregular_kind(path: str | os.PathLike[str]) -> str | None:
    """Return what is at a path in place of a regular file, such as `a folder`; None for a file, or for nothing.

    A pipe or a device must not be opened: reading one may never end.
    """
    try:
        return FILE_KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a loop of links"
        return "a broken link" if os.path.islink(path) else None
    except ValueError:  # a null character: no file can have this name
        return None


def read_regular_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: it cannot be read, or it is a pipe, a device or a folder.
    """
    kind = irregular_kind(path)
    if kind not in (None, "a broken link"):
        raise OSError(errno.EINVAL, f"it is {kind}, not a file", str(path))
    return path.read_bytes()


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


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all bytes into an open file.

    Raises:
        OSError: the disk is full or fails.
    """
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset)
        view = view[written:]
        offset += written


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


def free_disk_bytes(folder: Path) -> int:
    """Return the free space of the disk of a folder, which need not exist yet."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free
