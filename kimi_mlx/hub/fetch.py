"""One file from the hub to the disk: goes on where it left off, however it ended, and is there only if it is right."""

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
    """Whether the file is there, by its size."""
    return path.is_file() and path.stat().st_size == file.size_bytes


def read_range(repository: Repository, file: str, start: int, stop: int) -> bytes:
    """Bytes from start to before stop of a file.

    Raises:
        WeightsError: the file has no such bytes, or they cannot be fetched.
    """
    entry = repository.file(file)
    if not 0 <= start <= stop <= entry.size_bytes:
        raise WeightsError(
            f"`{file}` of `{repository.name}` has {entry.size_bytes} bytes, none from {start} to {stop}",
            hint="the repository is broken: choose another model",
        )
    return b"".join(stream_range(repository, entry, start, stop, threading.Event()))


def fetch_file(
    repository: Repository,
    file: RepositoryFile,
    target: Path,
    progress: Progress = ignore_progress,
    stop: threading.Event | None = None,
) -> None:
    """Fetch a file; one of the right size that is there already is left as it is.

    Args:
        repository: where the file is.
        file: what to fetch.
        target: where to; beside it, `.part` holds what has come so far.
        progress: told the bytes as they come, at first those that are there already.
        stop: calls it off when it is set.

    Raises:
        WeightsError: it cannot be fetched or written, or is wrong even when it is fetched again.
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
    """Fill the part, which is ours, and make it the target."""
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
    raise WeightsError(
        f"`{file.name}` of `{repository.name}` arrives broken: its checksum should be {checksum.expected} and is "
        f"{checksum.actual}",
        hint="try again later, or over another network",
    )


def _discard(stream: FileIO, meter: ProgressMeter) -> None:
    stream.truncate(0)
    meter.move_to(0)


def _fill(
    repository: Repository, file: RepositoryFile, stream: FileIO, meter: ProgressMeter, stop: threading.Event
) -> Checksum:
    """Append what is missing; the checksum is of all that is there then."""
    position = os.fstat(stream.fileno()).st_size
    if position > file.size_bytes:
        stream.truncate(0)
        position = 0
    meter.move_to(position)
    checksum = Checksum(file)
    _read_all(stream, checksum.update, stop)
    for piece in stream_range(repository, file, position, file.size_bytes, stop):
        _write_all(stream, piece)
        checksum.update(piece)
        meter.advance(len(piece))
    return checksum


def matches_checksum(path: Path, file: RepositoryFile, stop: threading.Event, progress: Progress | None = None) -> bool:
    """Whether a file on the disk is what the hub says: size and checksum."""
    progress = progress or ignore_progress
    if not has_size(path, file):
        return False
    checksum = Checksum(file)

    def take(data: memoryview) -> None:
        checksum.update(data)
        progress(len(data))

    with path.open("rb", buffering=0) as stream:
        _read_all(stream, take, stop)
    return checksum.is_valid


def _read_all(stream: FileIO, take: Callable[[memoryview], None], stop: threading.Event) -> None:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    stream.seek(0)
    while count := stream.readinto(buffer):
        if stop.is_set():
            raise Cancelled
        take(buffer[:count])


def _write_all(stream: FileIO, data: bytes) -> None:
    """Unbuffered: what has been written outlives this process, and a full disk shows here and not later."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
