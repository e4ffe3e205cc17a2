"""Download one file: resume after any interruption, verify the checksum, then rename the file to its final name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import rename_durably
from kimi_mlx.hub.error_messages import disk_error
from kimi_mlx.hub.partial_file import (
    Progress,
    ProgressMeter,
    ignore_progress,
    lock_partial_file,
    part_path,
    xet_part_path,
)
from kimi_mlx.hub.repository import Checksum, Repository, RepositoryFile
from kimi_mlx.hub.retries import Cancelled
from kimi_mlx.hub.transfer import stream_range
from kimi_mlx.hub.xet import fetch_by_xet

CHUNK_BYTES = 1 << 20


def has_size(path: Path, file: RepositoryFile) -> bool:
    """Return whether a file exists with the size that the hub lists."""
    return path.is_file() and path.stat().st_size == file.size_bytes


def read_range(repository: Repository, file: str, start: int, stop: int) -> bytes:
    """Return the bytes from `start` up to but excluding `stop` of a file.

    Raises:
        WeightsError: the file is too short, or the download failed.
    """
    entry = repository.file(file)
    if not 0 <= start <= stop <= entry.size_bytes:
        raise WeightsError(
            f"`{file}` of `{repository.name}` has {entry.size_bytes} bytes, but bytes {start} to {stop} are needed",
            hint="the repository is corrupt: choose another model",
        )
    return b"".join(stream_range(repository, entry, start, stop, threading.Event()))


def read_file(repository: Repository, file: RepositoryFile) -> bytes:
    """Return the content of a small file.

    Raises:
        WeightsError: the download failed, or the file is corrupt even after a second download.
    """
    checksum = Checksum(file)
    for _ in range(2):
        data = read_range(repository, file.name, 0, file.size_bytes)
        checksum = Checksum(file)
        checksum.update(data)
        if checksum.is_valid:
            return data
    raise corrupt_error(repository, file, checksum)


def corrupt_error(repository: Repository, file: RepositoryFile, checksum: Checksum) -> WeightsError:
    """Return the error for a file whose checksum is wrong after a second download."""
    return WeightsError(
        f"`{file.name}` of `{repository.name}` is corrupt: expected checksum {checksum.expected}, got "
        f"{checksum.actual}",
        hint="try again later, or over another network",
    )


def fetch_file(
    repository: Repository,
    file: RepositoryFile,
    target: Path,
    progress: Progress = ignore_progress,
    stop: threading.Event | None = None,
) -> None:
    """Download a file. An existing file of the right size is kept.

    Args:
        repository: repository of the file.
        file: file to download.
        target: destination; until the download is complete, its bytes are in `.part` next to it.
        progress: callback for the number of new bytes; those already on disk come first.
        stop: event that cancels the download.

    Raises:
        WeightsError: the download or the write failed, or the file is corrupt even after a second download.
        Cancelled: the event is set.
    """
    stop, meter = stop or threading.Event(), ProgressMeter(progress)
    part = part_path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not has_size(target, file):
            with lock_partial_file(target, meter, stop) as stream:
                if has_size(target, file):  # another process was faster
                    part.unlink()
                else:
                    _fetch(repository, file, stream, target, meter, stop)
        meter.move_to(file.size_bytes)
    except OSError as error:
        raise disk_error(error, target, file.size_bytes - meter.position) from error


def _fetch(
    repository: Repository,
    file: RepositoryFile,
    stream: FileIO,
    target: Path,
    meter: ProgressMeter,
    stop: threading.Event,
) -> None:
    """Complete the partial file, which this process has locked, and rename it to the target."""
    part, xet_part = part_path(target), xet_part_path(target)
    xet_part.unlink(missing_ok=True)
    is_fresh = os.fstat(stream.fileno()).st_size == 0
    if (
        is_fresh
        and fetch_by_xet(repository, file, xet_part, meter.advance, stop)
        and matches_checksum(xet_part, file, stop)
    ):
        rename_durably(xet_part, target)
        part.unlink()
        return
    xet_part.unlink(missing_ok=True)
    checksum = _fill(repository, file, stream, meter, stop)
    if not checksum.is_valid:
        _discard(stream, meter)
        checksum = _fill(repository, file, stream, meter, stop)
    if checksum.is_valid:
        rename_durably(part, target)
        return
    _discard(stream, meter)
    part.unlink()
    raise corrupt_error(repository, file, checksum)


def _discard(stream: FileIO, meter: ProgressMeter) -> None:
    stream.truncate(0)
    meter.move_to(0)


def _fill(
    repository: Repository, file: RepositoryFile, stream: FileIO, meter: ProgressMeter, stop: threading.Event
) -> Checksum:
    """Append the missing bytes, and return the checksum of the whole file."""
    position = os.fstat(stream.fileno()).st_size
    if position > file.size_bytes:
        stream.truncate(0)
        position = 0
    meter.move_to(position)
    checksum = Checksum(file)
    _read_all(stream, checksum.update, stop)
    for data in stream_range(repository, file, position, file.size_bytes, stop):
        _write_all(stream, data)
        checksum.update(data)
        meter.advance(len(data))
    return checksum


def matches_checksum(path: Path, file: RepositoryFile, stop: threading.Event, progress: Progress | None = None) -> bool:
    """Return whether a file on disk has the size and checksum that the hub lists."""
    progress = progress or ignore_progress
    if not has_size(path, file):
        return False
    checksum = Checksum(file)

    def add(data: memoryview) -> None:
        checksum.update(data)
        progress(len(data))

    with path.open("rb", buffering=0) as stream:
        _read_all(stream, add, stop)
    return checksum.is_valid


def _read_all(stream: FileIO, on_data: Callable[[memoryview], None], stop: threading.Event) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    stream.seek(0)
    while count := stream.readinto(buffer):
        if stop.is_set():
            raise Cancelled
        on_data(buffer[:count])


def _write_all(stream: FileIO, data: bytes) -> None:
    """Write all bytes of `data`. The stream has no buffer, so a full disk is an error here."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
