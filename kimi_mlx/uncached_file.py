"""Read a file past the page cache of the operating system.

A cache of the system would keep what the caller keeps anyway, and would take the memory from it.

    macOS    F_NOCACHE
    Linux    O_DIRECT if the file system has it and the read is aligned; else the pages are dropped after the read
"""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

IO_ALIGNMENT = 4096
"""Alignment in bytes of offsets, lengths and addresses of direct reads: enough for every disk in use."""

F_NOCACHE = 48
"""Command of fcntl on macOS. Source: <sys/fcntl.h>."""

MAX_RETRIES, RETRY_S = 1000, 0.001
"""Retries of a read that the system cannot start now (EAGAIN), and the pause between them."""


class UncachedFile:
    """An open file. Reads may run in several threads at once.

    Args:
        path: path of the file.
        uses_page_cache: whether to read through the page cache after all.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, uses_page_cache: bool = False):
        self.path = path
        self.uses_page_cache = uses_page_cache
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct = -1
        self.size_bytes = os.fstat(self._handle).st_size
        if uses_page_cache:
            return
        if sys.platform == "darwin":
            fcntl.fcntl(self._handle, F_NOCACHE, 1)
        elif hasattr(os, "O_DIRECT"):
            self._direct = _open_direct(path, self._handle)

    @property
    def is_direct(self) -> bool:
        """Whether aligned reads use O_DIRECT."""
        return self._direct >= 0

    def read(self, buffers: Sequence[np.ndarray], offset: int) -> int:
        """Fill buffers one after the other.

        Args:
            buffers: contiguous arrays of uint8. With O_DIRECT, the read is direct if all of them and `offset` are
                aligned to IO_ALIGNMENT.
            offset: first byte in the file.

        Returns:
            Number of bytes; less than the buffers hold only if the file ends before.

        Raises:
            OSError: the disk fails.
        """
        is_direct = self.is_direct and offset % IO_ALIGNMENT == 0 and all(map(is_aligned, buffers))
        left, done, num_retries = [buffer.data for buffer in buffers if buffer.nbytes], 0, 0
        while left:
            try:
                count = os.preadv(self._direct if is_direct else self._handle, left, offset + done)
            except OSError as error:
                if error.errno == errno.EAGAIN and num_retries < MAX_RETRIES:
                    num_retries += 1
                    time.sleep(RETRY_S)
                elif error.errno == errno.EINVAL and is_direct:  # a rest that is not aligned, or larger blocks
                    is_direct = False
                else:
                    raise
                continue
            if not count:
                break
            done += count
            left = _skip(left, count)
        if not is_direct and not self.uses_page_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, offset, done, os.POSIX_FADV_DONTNEED)
        return done

    def current_bytes(self) -> int:
        """Return the size of the file now; `size_bytes` is that when it was opened."""
        return os.fstat(self._handle).st_size

    def read_ahead(self, offset: int, num_bytes: int) -> None:
        """Let the system read bytes into its page cache in the background (Linux)."""
        if self.uses_page_cache and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._handle, offset, num_bytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file."""
        for handle in (self._handle, self._direct):
            if handle >= 0:
                os.close(handle)
        self._handle = self._direct = -1


def is_aligned(buffer: np.ndarray) -> bool:
    """Return whether address and length of a buffer allow a direct read."""
    return not (buffer.nbytes % IO_ALIGNMENT or address_of(buffer) % IO_ALIGNMENT)


def address_of(array: np.ndarray) -> int:
    """Return the address of an array's first byte."""
    return array.__array_interface__["data"][0]


def aligned_buffer(num_bytes: int) -> np.ndarray:
    """Return a buffer whose address allows direct reads: (num_bytes,) uint8, not initialized."""
    buffer = np.empty(num_bytes + IO_ALIGNMENT, np.uint8)
    start = -address_of(buffer) % IO_ALIGNMENT
    return buffer[start : start + num_bytes]


def _open_direct(path: Path, handle: int) -> int:
    """Open a file with O_DIRECT, and return -1 if its file system has no such reads, or if `path` was replaced."""
    try:
        direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1
    try:
        os.preadv(direct, [aligned_buffer(IO_ALIGNMENT).data], 0)
        if os.path.sameopenfile(direct, handle):
            return direct
    except OSError:
        pass
    os.close(direct)
    return -1


def _skip(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """Return the buffers without their first bytes."""
    for index, buffer in enumerate(buffers):
        if num_bytes < buffer.nbytes:
            return [buffer[num_bytes:], *buffers[index + 1 :]]
        num_bytes -= buffer.nbytes
    return []
