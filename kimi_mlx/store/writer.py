"""Build one rank's store: create files of known size, fill them slice by slice in any order, finish one after another.

The journal lets a killed build resume; slices may then be written twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kimi_mlx.files import rename_durably, sha256_of, write_at
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.disk import allocated_bytes, write_error
from kimi_mlx.store.folder_lock import FolderLock
from kimi_mlx.store.journal import BuildState, Journal
from kimi_mlx.store.manifest import FORMAT, MANIFEST_NAME, Manifest, Origin, StoredFile, stored_file
from kimi_mlx.store.store_folders import file_name
from kimi_mlx.weights.expert_plan import EXPERT_ENTRIES
from kimi_mlx.weights.expert_tag import TAG_BYTES, ExpertTag
from kimi_mlx.weights.file_layout import RECORDS_NAME, FileLayout, FileRegion, layer_layout, records_layout
from kimi_mlx.weights.plan import LayerPlan

MAX_OPEN_FILES = 16
"""Maximum number of open files per rank: macOS allows a process 256 by default, and a store has up to 62 per rank."""


class RankWriter:
    """Writer of one rank's store; a context manager that locks the folder.

    Args:
        folder: folder of the rank.
        origin: repository and commit.
        placement: shares of all ranks.
        rank: number of the rank.
        num_layers: number of layers; the top follows the last one, and the vision tower, if any, the top.
        source_has_vision: as in Manifest.
        plan: number of a store file -> its plan for this rank.
        sources_of_file: for each store file, the numbers of the source files that it is made from.
    """

    def __init__(
        self,
        folder: Path,
        origin: Origin,
        placement: Placement,
        rank: int,
        num_layers: int,
        source_has_vision: bool | None,
        plan: Callable[[int], LayerPlan],
        sources_of_file: Sequence[frozenset[int]],
    ):
        self.folder = folder
        self.rank = rank
        self._origin, self._placement = origin, placement
        self._plan = plan
        self._sources_of_file = sources_of_file
        self._num_layers, self._source_has_vision = num_layers, source_has_vision
        self._numbers = range(len(sources_of_file))
        self._open: dict[int, int] = {}
        self._unsynced: set[int] = set()
        self._finished: dict[int, StoredFile] = {}
        self._written_sources: set[int] = set()
        self._lock = FolderLock(folder)
        self._with_stacks: set[int] = set()
        self._experts: dict[int, bool] = {}
        self._journal = Journal(folder, store_identity(origin, placement, rank))

    def __enter__(self) -> RankWriter:
        """Lock the folder, read the journal and keep the finished files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.__enter__()
            self._read_journal()
            self._finish_full_files()  # killed between the last record and the rename
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Close all files; unfinished ones stay for the next build."""
        self._journal.close()
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()
        self._lock.__exit__(None, None, None)

    @property
    def unfinished(self) -> list[int]:
        """Numbers of the files that are not finished."""
        return [number for number in self._numbers if number not in self._finished]

    @property
    def missing_bytes(self) -> int:
        """Disk space still needed by the unfinished files."""
        sizes = {number: self._layout(number).size_bytes for number in self.unfinished}
        return sum(max(0, size - allocated_bytes(self._part(number))) for number, size in sizes.items())

    def has_records(self, number: int) -> bool:
        """Return whether the routed experts of a file are records; not if an earlier version has begun the file."""
        return number not in self._with_stacks

    def needs_source(self, source: int) -> bool:
        """Return whether slices of a source file are still to be written for this rank."""
        return source not in self._written_sources and any(
            source in self._sources_of_file[number] for number in self.unfinished
        )

    def write(self, region: FileRegion, offset: int, data: np.ndarray) -> None:
        """Write a chunk of a slice.

        Args:
            region: location of the whole slice in the store.
            offset: offset of the chunk within the slice, in bytes.
            data: (bytes,) uint8.

        Raises:
            WeightsError: the disk is full or fails.
        """
        try:
            region.write(self._handle(region.file), offset, data)
        except OSError as error:
            raise write_error(self._part(region.file), error) from error

    def commit(self, source: int) -> None:
        """Record that all slices of a source file are written; finish the files that are complete."""
        try:
            for number in sorted(self._unsynced):
                os.fsync(self._handle(number))
            self._unsynced.clear()
            self._journal.record_source(source)
            self._written_sources.add(source)
            self._finish_full_files()
        except OSError as error:
            raise write_error(self.folder, error) from error

    def complete(self) -> Manifest:
        """Write the manifest, once all files are finished."""
        assert not self.unfinished
        files = tuple(self._finished[number] for number in range(self._num_layers + 1))
        vision = self._finished.get(self._num_layers + 1)
        manifest = Manifest(self._origin, self._placement, self.rank, files, vision, self._source_has_vision)
        manifest.write(self.folder)
        for path in unlisted_files(self.folder, manifest):
            path.unlink(missing_ok=True)
        return manifest

    def discard(self, names: Sequence[str]) -> None:
        """Remove broken files from the store, so that they are built again.

        Args:
            names: file names. With the manifest's name, every file whose checksum differs from the journal is removed.
        """
        if MANIFEST_NAME in names:
            finished = self._finished.values()
            names = [file.name for file in finished if sha256_of(self.folder / file.name) != file.sha256]
        (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        for number in [number for number, file in self._finished.items() if file.name in names]:
            (self.folder / self._finished.pop(number).name).unlink(missing_ok=True)
            self._with_stacks.discard(number)
            self._written_sources -= self._sources_of_file[number]
        self._rewrite_journal()

    def _finish_full_files(self) -> None:
        for number in self.unfinished:
            if self._sources_of_file[number] <= self._written_sources:
                self._finish(number)

    def _finish(self, number: int) -> None:
        has_records, part, plan = self.has_records(number), self._part(number), self._plan(number)
        handle = self._handle(number)
        if has_records:
            write_tags(handle, plan, self._tag(number))
        os.fsync(handle)
        os.close(self._open.pop(number))
        self._unsynced.discard(number)
        file = stored_file(plan, self._name(number), part.stat().st_size, sha256_of(part), has_records)
        rename_durably(part, self.folder / file.name)
        self._journal.record_file(number, file)
        self._finished[number] = file

    def _handle(self, number: int) -> int:
        """Return the open file; at most MAX_OPEN_FILES stay open, the most recently used ones."""
        handle = self._open.pop(number, None)
        if handle is None:
            while len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            handle = self._create(number)
        self._open[number] = handle
        self._unsynced.add(number)
        return handle

    def _create(self, number: int) -> int:
        """Open an unfinished file, with its header and full size."""
        path = self._part(number)
        layout = self._layout(number)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(handle, layout.size_bytes)
            os.pwrite(handle, layout.header, 0)
        except OSError as error:
            raise write_error(path, error) from error
        return handle

    def _part(self, number: int) -> Path:
        return self.folder / (self._name(number) + ".part")

    def _name(self, number: int) -> str:
        return file_name(number, self._num_layers, self._has_experts(number) and self.has_records(number))

    def _has_experts(self, number: int) -> bool:
        if number not in self._experts:
            self._experts[number] = EXPERT_ENTRIES["down"] in self._plan(number).entries
        return self._experts[number]

    def _layout(self, number: int) -> FileLayout:
        return layer_layout(self._plan(number), self.has_records(number))

    def _tag(self, number: int) -> ExpertTag:
        return ExpertTag(number, self.rank, self._placement.digest, self._origin.commit)

    def _read_journal(self) -> None:
        """Restore the state of an earlier build, as far as its files still exist.

        Raises:
            WeightsError: the folder contains a store of another source.
        """
        state = self._journal.read()
        if state is None:
            state = BuildState()
            for path in self.folder.glob("*.safetensors*"):
                path.unlink()
        self._written_sources = state.sources
        for number in self._numbers:
            if self._is_begun_with_stacks(number):
                self._with_stacks.add(number)
            if self._is_finished(number):
                path, has_records = self.folder / self._name(number), self.has_records(number)
                checksum = state.checksum(number, path.name) or sha256_of(path)  # killed between rename and record
                size = path.stat().st_size
                self._finished[number] = stored_file(self._plan(number), path.name, size, checksum, has_records)
            elif not self._part(number).is_file():  # the file is gone, so its sources must be written again
                self._written_sources -= self._sources_of_file[number]
        if any(number <= self._num_layers for number in self.unfinished):  # text works while a tower is added
            (self.folder / MANIFEST_NAME).unlink(missing_ok=True)
        self._rewrite_journal()

    def _is_begun_with_stacks(self, number: int) -> bool:
        """Return whether an earlier version has begun or finished a file, and it has not been rewritten since."""
        if not self._has_experts(number) or self._is_finished(number):
            return False
        path = self.folder / file_name(number, self._num_layers, has_records=False)
        size = layer_layout(self._plan(number), has_records=False).size_bytes
        return path.with_name(path.name + ".part").is_file() or (path.is_file() and path.stat().st_size == size)

    def _is_finished(self, number: int) -> bool:
        """Return whether a finished file exists; a file gets its final name only when complete and flushed."""
        path = self.folder / self._name(number)
        return path.is_file() and path.stat().st_size == self._layout(number).size_bytes

    def _rewrite_journal(self) -> None:
        self._journal.rewrite(sorted(self._written_sources), self._finished.items())


def store_identity(origin: Origin, placement: Placement, rank: int) -> dict[str, Any]:
    """Return the first line of the journal of a rank's store."""
    return {
        "format": FORMAT,
        "repository": origin.repository,
        "commit": origin.commit,
        "placement": placement.to_dict(),
        "rank": rank,
    }


def write_tags(handle: int, plan: LayerPlan, tag: ExpertTag) -> None:
    """Write the tags of all records of an open file, if it has any.

    Raises:
        OSError: the disk is full or fails.
    """
    records = records_layout(plan)
    if records is None:
        return
    start, size = layer_layout(plan).starts[RECORDS_NAME], records.record.record_bytes
    for index in range(records.num_experts):
        end = start + (index + 1) * size
        write_at(handle, tag.to_bytes(records.first_expert + index), end - TAG_BYTES)


def unlisted_files(folder: Path, manifest: Manifest) -> list[Path]:
    """Return the files of layers that are not in the manifest: remains of a killed rewrite."""
    listed = {file.name for file in manifest.files}
    return [path for path in folder.glob("layer-*.safetensors*") if path.name not in listed]
