"""Rewrite the files of a store that an earlier version built: one record for each routed expert instead of stacks.

Files are rewritten one after the other. The new file is written next to the old one under another name; then the
manifest is replaced, which decides which of the two is valid; then the old file is removed. So the store is complete at
all times, needs space for one more file, and a killed rewrite resumes with the next file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import CHUNK_BYTES, rename_durably, sha256_of, write_at
from kimi_mlx.store.disk import check_space, write_error
from kimi_mlx.store.experts import expert_tag
from kimi_mlx.store.folder_lock import FolderLock
from kimi_mlx.store.journal import BuildState, Journal
from kimi_mlx.store.manifest import Manifest, StoredFile, read_manifest, stored_file
from kimi_mlx.store.store_folders import file_name, repair_hint
from kimi_mlx.store.writer import store_identity, unlisted_files, write_tags
from kimi_mlx.weights.expert_tag import ExpertTag
from kimi_mlx.weights.file_layout import layer_layout, moves_into_records
from kimi_mlx.weights.header import unreadable_error
from kimi_mlx.weights.plan import ArrayPlan, LayerPlan, WeightPlan

SPARE_BYTES = 64 << 20
"""Disk space to leave free for the journal and the manifest."""


def stacked_sizes(manifest: Manifest) -> list[int]:
    """Return the sizes of the files whose routed experts are in stacks."""
    return [file.size_bytes for file in manifest.files if file.has_stacks]


def rewrite_store(folder: Path, progress: Callable[[int], None] = lambda delta: None) -> WeightsError | None:
    """Rewrite all files of one rank whose routed experts are in stacks.

    Args:
        folder: folder of the rank.
        progress: callback with the number of newly read bytes of the old files.

    Returns:
        Error if files stay as they are, because the disk is full or read-only; None if all experts are records now.

    Raises:
        WeightsError: an old file is damaged, or another process writes to the folder. The store stays complete.
    """
    try:
        with FolderLock(folder):
            manifest = read_manifest(folder)
            for path in unlisted_files(folder, manifest):  # of a killed rewrite
                path.unlink()
            stacked = [number for number, file in enumerate(manifest.files) if file.has_stacks]
            journal = Journal(folder, store_identity(manifest.origin, manifest.placement, manifest.rank))
            try:
                for number in stacked:
                    if (problem := _lack_of_space(folder, manifest.files[number])) is not None:
                        return problem
                    if number == stacked[0]:
                        state = journal.read() or BuildState()
                        journal.rewrite(sorted(state.sources), enumerate(manifest.all_files))
                    manifest = _rewrite_file(folder, manifest, number, journal, progress)
            finally:
                journal.close()
    except OSError as error:
        return write_error(folder, error)
    return None


def _lack_of_space(folder: Path, file: StoredFile) -> WeightsError | None:
    try:
        check_space(folder, layer_layout(stored_plan(file)).size_bytes + SPARE_BYTES)
    except WeightsError as error:
        return error
    return None


def _rewrite_file(
    folder: Path, manifest: Manifest, number: int, journal: Journal, progress: Callable[[int], None]
) -> Manifest:
    """Rewrite one file; return the new manifest."""
    old = manifest.files[number]
    plan = stored_plan(old)
    name = file_name(number, len(manifest.files) - 1, has_records=True)
    part = folder / f"{name}.part"
    try:
        checksum = _write_records(folder / old.name, part, plan, expert_tag(manifest, number), progress)
        if checksum != old.sha256:
            raise WeightsError(
                f"the store's file `{folder / old.name}` is damaged: its checksum is {checksum[:12]}..., not "
                f"{old.sha256[:12]}...",
                hint=repair_hint(manifest),
            )
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    new = stored_file(plan, name, part.stat().st_size, sha256_of(part))
    rename_durably(part, folder / name)
    journal.record_file(number, new)
    manifest = replace(manifest, files=(*manifest.files[:number], new, *manifest.files[number + 1 :]))
    manifest.write(folder)
    (folder / old.name).unlink()
    return manifest


def _write_records(source: Path, part: Path, plan: LayerPlan, tag: ExpertTag, progress: Callable[[int], None]) -> str:
    """Write a file with records; return the checksum of the file with stacks, which is read once."""
    layout = layer_layout(plan)
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.ftruncate(handle, layout.size_bytes)
        write_at(handle, layout.header, 0)
        checksum = _copy(source, plan, handle, progress)
        write_tags(handle, plan, tag)
        os.fsync(handle)
    finally:
        os.close(handle)
    return checksum


def _copy(source: Path, plan: LayerPlan, target: int, progress: Callable[[int], None]) -> str:
    """Copy all arrays from a file with stacks into one with records, and return the checksum of the former."""
    digest = hashlib.sha256()
    with source.open("rb") as stream:

        def read(length: int) -> Iterator[bytes]:
            while length:
                try:
                    data = stream.read(min(length, CHUNK_BYTES))
                except OSError as error:
                    raise unreadable_error(source, error) from error
                if not data:
                    return
                length -= len(data)
                digest.update(data)
                progress(len(data))
                yield data

        for start, length, destination in sorted(moves_into_records(plan)):
            assert start >= stream.tell()
            for _ in read(start - stream.tell()):
                pass
            for data in read(length):
                write_at(target, data, destination)
                destination += len(data)
        for _ in read(source.stat().st_size - stream.tell()):
            pass
    return digest.hexdigest()


def stored_plan(file: StoredFile) -> LayerPlan:
    """Return a plan without copies that has the arrays of a file with stacks."""
    assert file.experts is None
    entries = {
        entry: tuple(
            WeightPlan(
                tuple(ArrayPlan(name, array.dtype, array.shape) for name, array in part.arrays.items()),
                part.quantization,
            )
            for part in parts
        )
        for entry, parts in file.entries.items()
    }
    return LayerPlan(entries, file.latent_first, file.num_fused_shared, file.first_expert)
