"""Building one rank's store: files of known size, filled slice by slice in any order, finished one by one.

What has been done is in a journal, a line each, flushed to the disk: a killed process goes on where it was. A slice
that is written twice does no harm.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import is_disk_full, rename_durably, sha256_of
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.manifest import FORMAT, MANIFEST_NAME, Manifest, Origin, StoredFile, stored_file
from kimi_mlx.store.stores import file_name, folder_prefix, repository_stores
from kimi_mlx.units import format_bytes
from kimi_mlx.weights.file_layout import FileLayout, lay_out
from kimi_mlx.weights.layer_plan import LayerPlan, SliceCopy, as_shape3

JOURNAL_NAME = "journal.jsonl"
MAX_OPEN_FILES = 16
"""Of one rank at a time."""


@dataclass(frozen=True)
class FileRegion:
    """Where a slice goes in a file.

    Args:
        file: number of the layer; the one behind the last is the top.
        start: byte of its first member.
        stride: bytes from member to member.
        member_bytes: of one member, which lies in one piece.
    """

    file: int
    start: int
    stride: int
    member_bytes: int


def layout_of(plan: LayerPlan) -> FileLayout:
    """The layout of a layer's file."""
    return lay_out((name, array.dtype, array.shape) for name, array in plan.arrays())


def file_regions(plan: LayerPlan, file: int) -> Iterator[tuple[SliceCopy, FileRegion]]:
    """Every slice of a layer, and where it goes in its file."""
    layout = layout_of(plan)
    for name, array in plan.arrays():
        _, rows, columns = as_shape3(array.shape)
        row_bytes = array.size_bytes // max(as_shape3(array.shape)[0] * rows, 1)
        assert row_bytes % max(columns, 1) == 0
        for move in array.moves:
            start = layout.starts[name] + (move.member * rows + move.row) * row_bytes
            yield move, FileRegion(file, start, rows * row_bytes, move.box[1] * row_bytes)


class RankWriter:
    """One rank's store being built; a context manager that holds the folder for itself.

    Args:
        folder: of the rank.
        origin: repository and commit.
        placement: of all ranks.
        rank: whose it is.
        plan: returns the plan of a layer (or of the top) for this rank.
        sources: for each file of the store the numbers of the source files that fill it.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        placement: Placement,
        rank: int,
        plan: Callable[[int], LayerPlan],
        sources: Sequence[frozenset[int]],
    ):
        self.folder = folder
        self.rank = rank
        self._origin, self._placement = origin, placement
        self._plan = plan
        self._sources = sources
        self._top = len(sources) - 1
        self._open: dict[int, int] = {}
        self._unsynced: set[int] = set()
        self._finished: dict[int, StoredFile] = {}
        self._applied: set[int] = set()
        self._lock = self._journal = -1

    def __enter__(self) -> RankWriter:
        """Lock the folder, read the journal, keep what is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock_folder()
            self._read_journal()
            self._finish_full_files()  # killed between the last record and the rename
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files; what is not finished stays for the next time."""
        for handle in [*self._open.values(), self._journal, self._lock]:
            if handle >= 0:
                os.close(handle)
        self._open.clear()
        self._journal = self._lock = -1

    def _lock_folder(self) -> None:
        self._lock = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WeightsError(
                f"another process is building `{self.folder}`", hint="wait for it, or end it, then try again"
            ) from error
        except OSError:  # a disk without locks
            return

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the files that are not there yet."""
        return [number for number in range(self._top + 1) if number not in self._finished]

    @property
    def missing_bytes(self) -> int:
        """Disk space that the rest still takes."""
        sizes = {number: layout_of(self._plan(number)).size_bytes for number in self.unfinished}
        return sum(size - _allocated_bytes(self._part(number)) for number, size in sizes.items())

    def needs(self, source: int) -> bool:
        """Whether a source file has something for this rank that is not written yet."""
        return source not in self._applied and any(source in self._sources[number] for number in self.unfinished)

    def write(self, place: FileRegion, offset: int, data: np.ndarray) -> None:
        """Write a piece of a slice.

        Args:
            place: of the slice.
            offset: of the piece, in bytes of the slice.
            data: (bytes,) uint8.

        Raises:
            WeightsError: the disk is full or fails.
        """
        handle = self._handle(place.file)
        view = data.data
        while view:
            member, inside = divmod(offset, place.member_bytes)
            length = min(len(view), place.member_bytes - inside)
            try:
                written = os.pwrite(handle, view[:length], place.start + member * place.stride + inside)
            except OSError as error:
                raise write_error(self._part(place.file), error) from error
            view = view[written:]
            offset += written

    def commit(self, source: int) -> None:
        """Record that everything of a source file is written; finish the files that are full."""
        try:
            for number in sorted(self._unsynced):
                os.fsync(self._handle(number))
            self._unsynced.clear()
            self._record({"source": source})
            self._applied.add(source)
            self._finish_full_files()
        except OSError as error:
            raise write_error(self.folder, error) from error

    def complete(self) -> Manifest:
        """Write the manifest; all files are finished."""
        assert not self.unfinished
        files = tuple(self._finished[number] for number in range(self._top + 1))
        manifest = Manifest(self._origin, self._placement, self.rank, files)
        manifest.write(self.folder)
        return manifest

    def discard(self, names: Sequence[str]) -> None:
        """Take broken files out of the store, so that the next build makes them anew.

        Args:
            names: of the files; a broken manifest stands for all that are not as the journal says.
        """
        if MANIFEST_NAME in names:
            finished = self._finished.values()
            names = [file.name for file in finished if sha256_of(self.folder / file.name) != file.sha256]
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        for number in [number for number, file in self._finished.items() if file.name in names]:
            (self.folder / self._finished.pop(number).name).unlink(missing_ok=True)
            self._applied -= self._sources[number]
        self._rewrite_journal()

    def _finish_full_files(self) -> None:
        for number in self.unfinished:
            if self._sources[number] <= self._applied:
                self._finish(number)

    def _finish(self, number: int) -> None:
        os.fsync(self._handle(number))
        os.close(self._open.pop(number))
        self._unsynced.discard(number)
        part, plan = self._part(number), self._plan(number)
        file = stored_file(plan, file_name(number, self._top), part.stat().st_size, sha256_of(part))
        rename_durably(part, self.folder / file.name)
        self._record({"file": number, "size_bytes": file.size_bytes, "sha256": file.sha256})
        self._finished[number] = file

    def _handle(self, number: int) -> int:
        """The open file, among those used last: there may be hundreds, and systems allow 256."""
        handle = self._open.pop(number, None)
        if handle is None:
            while len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            handle = self._create(number)
        self._open[number] = handle
        self._unsynced.add(number)
        return handle

    def _create(self, number: int) -> int:
        """Open a file's beginning; a new one gets its header and its size."""
        path = self._part(number)
        layout = layout_of(self._plan(number))
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(handle, layout.size_bytes)
            os.pwrite(handle, layout.header, 0)
        except OSError as error:
            raise write_error(path, error) from error
        return handle

    def _part(self, number: int) -> Path:
        return self.folder / (file_name(number, self._top) + ".part")

    def _identity(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "repository": self._origin.repository,
            "commit": self._origin.commit,
            "placement": self._placement.to_dict(),
            "rank": self.rank,
        }

    def _read_journal(self) -> None:
        """Take over what an earlier process has done, as far as its files are still there."""
        lines = _read_lines(self.folder / JOURNAL_NAME)
        known: dict[int, str] = {}
        if lines and lines[0] != self._identity():  # of another version or commit
            for path in self.folder.glob("*.safetensors*"):
                path.unlink()
        elif lines:
            self._applied = {line["source"] for line in lines if "source" in line}
            known = {line["file"]: line["sha256"] for line in lines if "file" in line}
        for number in range(self._top + 1):
            if self._is_whole(number):
                path = self.folder / file_name(number, self._top)
                checksum = known.get(number) or sha256_of(path)  # killed between rename and record
                self._finished[number] = stored_file(self._plan(number), path.name, path.stat().st_size, checksum)
            elif not self._part(number).is_file():  # nothing of it is here, whatever the journal says of its sources
                self._applied -= self._sources[number]
        if self.unfinished:
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        self._rewrite_journal()

    def _is_whole(self, number: int) -> bool:
        """Whether a finished file is there: only what is full and on the disk gets its name."""
        path = self.folder / file_name(number, self._top)
        return path.is_file() and path.stat().st_size == layout_of(self._plan(number)).size_bytes

    def _rewrite_journal(self) -> None:
        if self._journal >= 0:
            os.close(self._journal)
        path = self.folder / JOURNAL_NAME
        part = path.with_name(path.name + ".part")
        try:
            self._journal = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._record(self._identity())
            for source in sorted(self._applied):
                self._record({"source": source}, is_last=False)
            for number, file in self._finished.items():
                self._record({"file": number, "size_bytes": file.size_bytes, "sha256": file.sha256}, is_last=False)
            os.fsync(self._journal)
            rename_durably(part, path)
        except OSError as error:
            raise write_error(path, error) from error

    def _record(self, line: dict[str, Any], is_last: bool = True) -> None:
        os.write(self._journal, json.dumps(line).encode() + b"\n")
        if is_last:
            os.fsync(self._journal)


def stored_bytes(folder: Path) -> int:
    """Disk space that a rank's store takes, complete or not."""
    return sum(map(_allocated_bytes, folder.glob("*.safetensors*")))


def partial_store_commit(stores: Path, repository: str, ranks: int, strategy: str) -> str | None:
    """The commit of a repository whose stores for so many ranks were begun here last, finished or not."""
    for folder in partial_stores(stores, repository, ranks, strategy):
        for journal in folder.glob(f"rank-*/{JOURNAL_NAME}"):
            lines = _read_lines(journal)
            if lines and lines[0].get("repository") == repository:
                return str(lines[0]["commit"])
    return None


def partial_stores(stores: Path, repository: str, ranks: int, strategy: str | None) -> list[Path]:
    """Folders of placements for so many ranks, whole or not, the one that was worked on last first.

    Args:
        stores: where stores are kept.
        repository: of the model.
        ranks: how many share it.
        strategy: how; None for any.
    """
    prefix = f"*-{ranks}-" if strategy is None else folder_prefix(strategy, ranks)
    journals = repository_stores(stores, repository).glob(f"*/{prefix}*/rank-*/{JOURNAL_NAME}")
    newest = sorted(journals, key=lambda path: -path.stat().st_mtime)
    return list(dict.fromkeys(path.parent.parent for path in newest))


def write_error(path: Path, error: OSError) -> WeightsError:
    """What to say when a file cannot be written."""
    if is_disk_full(error):
        return WeightsError(
            f"the disk is full: `{path}` cannot be written",
            hint="free some space and type the same command again: it goes on where it was",
        )
    return WeightsError(f"`{path}` cannot be written: {error.strerror}", hint="check the folder and its disk")


def check_space(folder: Path, needed_bytes: int) -> None:
    """Refuse to start what the disk cannot hold.

    Raises:
        WeightsError: with both numbers.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed_bytes > free:
        raise WeightsError(
            f"`{folder}` needs {format_bytes(needed_bytes)} more, but its disk has {format_bytes(free)} free",
            hint="free some space, or set KIMI_MLX_STORES to a folder on a larger disk",
        )


def _allocated_bytes(path: Path) -> int:
    """What a file already takes on the disk; 0 if it is not there."""
    return path.stat().st_blocks * 512 if path.is_file() else 0


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines; the last one may have been cut off."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if isinstance(value, dict):
                lines.append(cast(dict[str, Any], value))
    return lines
