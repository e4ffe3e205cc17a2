"""Remove a model from this machine: its stores, and its download in the Hugging Face cache."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kimi_mlx.errors import WeightsError
from kimi_mlx.folders import stores_folder
from kimi_mlx.hub.cache import repository_folder
from kimi_mlx.hub.shared_blobs import freed_bytes, remove_unused, shared_blobs
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.store.store_folders import is_same_source, source_folder, sources_in

REMOVED_SUFFIX = "~removed"
"""Suffix of a folder while its files are deleted, so that an interrupted removal leaves nothing that can be loaded."""

LOCKED_FILES = ("*/*/rank-*/.lock", "blobs/*.part", "blobs/*.xet-part")
"""Files that a running build or download locks, relative to a removable folder."""


@dataclass(frozen=True)
class RemovableFolder:
    """A folder that belongs to a model and can be removed.

    Args:
        kind: `store` for the stores of all commits and placements, `download` for the model in the Hugging Face cache.
        folder: path of the folder.
        size_bytes: bytes that its removal frees; links to blobs of other repositories do not count.
    """

    kind: Literal["store", "download"]
    folder: Path
    size_bytes: int


def find_removable(model: ModelRef) -> list[RemovableFolder]:
    """Return the folders that belong to a model, complete or not. The user's own folder is never among them."""
    folders: list[RemovableFolder] = []
    stores = stores_folder()
    source = model.repository or (model.folder and str(model.folder.resolve()))
    if stores is not None and source is not None:
        existing = _existing("store", source_folder(stores, source))
        folders += [removable for removable in existing if _is_only_of(removable.folder, source)]
    if model.repository is not None:
        folders += _existing("download", repository_folder(model.repository))
    return folders


def check_unused(folders: list[RemovableFolder]) -> None:
    """Check that no process writes to the folders.

    Raises:
        WeightsError: a process builds stores or downloads the model.
    """
    for removable in folders:
        for file in _locked_files(removable.folder):
            raise WeightsError(
                f"`{file.parent}` is in use: another process is downloading the model",
                hint="wait for it or end it, then run this again",
            )


def remove(removable: RemovableFolder) -> None:
    """Delete a folder and everything in it.

    Raises:
        WeightsError: a file cannot be deleted; a second call continues.
    """
    folder, shared = removable.folder, shared_blobs(removable.folder)
    renamed = folder if folder.name.endswith(REMOVED_SUFFIX) else folder.with_name(folder.name + REMOVED_SUFFIX)
    try:
        if renamed != folder:
            folder.rename(renamed)
        shutil.rmtree(renamed)
        remove_unused(shared)
    except OSError as error:
        raise WeightsError(
            f"cannot remove `{folder}`: {error.filename}: {error.strerror}", hint="check its owner and permissions"
        ) from error


def _existing(kind: Literal["store", "download"], folder: Path) -> Iterator[RemovableFolder]:
    """Yield the rest of an interrupted removal of the folder, then the folder itself. Links are skipped."""
    for path in (folder.with_name(folder.name + REMOVED_SUFFIX), folder):
        if path.is_dir() and not path.is_symlink():
            yield RemovableFolder(kind, path, _size_bytes(path) + freed_bytes(path))


def _is_only_of(folder: Path, source: str) -> bool:
    """Return whether a folder has no stores of other sources; earlier versions could mix two sources in one folder."""
    return all(is_same_source(other, source) for other in sources_in(folder))


def _size_bytes(folder: Path) -> int:
    return sum(
        os.lstat(os.path.join(root, name)).st_size
        for root, _, names in os.walk(folder)
        for name in names
        if not os.path.islink(os.path.join(root, name))
    )


def _locked_files(folder: Path) -> Iterator[Path]:
    """Yield the files that another process has locked."""
    for pattern in LOCKED_FILES:
        for file in folder.glob(pattern):
            try:
                with file.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                yield file
            except OSError:  # unreadable, or a disk without locks
                continue
