"""Reads past the page cache: the bytes are those of the file, aligned or not, with and without O_DIRECT."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from kimi_mlx.uncached_file import IO_ALIGNMENT, UncachedFile, aligned_buffer, is_aligned


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "file"
    file.write_bytes(np.random.default_rng(1).bytes(5 * IO_ALIGNMENT + 100))
    return file


def read(file: UncachedFile, buffers: list[np.ndarray], offset: int) -> bytes:
    count = file.read(buffers, offset)
    return b"".join(buffer.tobytes() for buffer in buffers)[:count]


@pytest.mark.parametrize("uses_page_cache", [False, True])
def test_aligned_and_unaligned_reads(path: Path, uses_page_cache: bool) -> None:
    data = path.read_bytes()
    file = UncachedFile(path, uses_page_cache)
    assert file.size_bytes == len(data)
    assert not (uses_page_cache and file.is_direct)
    aligned = [aligned_buffer(IO_ALIGNMENT), aligned_buffer(2 * IO_ALIGNMENT)]
    assert all(map(is_aligned, aligned))
    assert read(file, aligned, IO_ALIGNMENT) == data[IO_ALIGNMENT : 4 * IO_ALIGNMENT]
    odd = [np.empty(3, np.uint8), aligned_buffer(IO_ALIGNMENT)[1:]]
    assert read(file, odd, 7) == data[7 : 7 + 3 + IO_ALIGNMENT - 1]
    assert read(file, aligned, 4 * IO_ALIGNMENT) == data[4 * IO_ALIGNMENT :]  # ends early
    assert read(file, aligned, 10 * IO_ALIGNMENT) == b""
    file.close()


def test_short_reads_and_busy_disks_are_continued(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, file = path.read_bytes(), UncachedFile(path)
    preadv, calls = os.preadv, 0

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise OSError(errno.EAGAIN, "try again")
        return preadv(handle, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", short)
    buffers = [aligned_buffer(IO_ALIGNMENT), aligned_buffer(0), aligned_buffer(IO_ALIGNMENT)]
    assert read(file, buffers, 0) == data[: 2 * IO_ALIGNMENT]
    assert calls > 8


def test_errors_of_the_disk_are_raised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = UncachedFile(path)

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(OSError, match="input/output error"):
        file.read([aligned_buffer(10)], 0)
