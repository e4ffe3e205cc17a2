"""Remove what `kimi-mlx download` made of a model on this machine: its stores and its download."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kimi_mlx.errors import WeightsError
from kimi_mlx.folders import stores_folder
from kimi_mlx.hub.cache import repository_folder
from kimi_mlx.store.journal import JOURNAL_NAME
from kimi_mlx.store.locate import ModelRef
from kimi_mlx.store.manifest import MANIFEST_NAME
from kimi_mlx.store.stores import repository_stores

REMOVED_SUFFIX = "~removed"
"""Suffix of a folder while its files are deleted: an interrupted removal leaves nothing that could be loaded."""

LOCKED_FILES = ("*/*/rank-*/.lock", "blobs/*.part", "blobs/*.xet-part")
"""Files that a build or a download locks while it works, relative to a removable folder."""


@dataclass(frozen=True)
class RemovableFolder:
    """A folder that `remove` deletes.

    Args:
        kind: `store` for the stores of all commits and placements, `download` for the model in the Hugging Face cache.
        folder: path of the folder.
        size_bytes: disk space of its files; links count nothing.
    """

    kind: Literal["store", "download"]
    folder: Path
    size_bytes: int


def find_removable(model: ModelRef) -> list[RemovableFolder]:
    """Return the folders that belong to a model, complete or not. A folder that the user named is not among them."""
    folders: list[RemovableFolder] = []
    stores = stores_folder()
    source = model.repository or (model.folder and str(model.folder.resolve()))
    if stores is not None and source is not None:
        existing = _existing("store", repository_stores(stores, source))
        folders += [removable for removable in existing if _is_of(removable.folder, source)]
    if model.repository is not None:
        folders += _existing("download", repository_folder(model.repository))
    return folders


def check_unused(folders: list[RemovableFolder]) -> None:
    """Check that no process builds or downloads into the folders.

    Raises:
        WeightsError: one does.
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
        WeightsError: a file cannot be deleted; run it again after fixing the cause.
    """
    folder = removable.folder
    renamed = folder if folder.name.endswith(REMOVED_SUFFIX) else folder.with_name(folder.name + REMOVED_SUFFIX)
    try:
        if renamed != folder:
            folder.rename(renamed)
        shutil.rmtree(renamed)
    except OSError as error:
        raise WeightsError(
            f"cannot remove `{folder}`: {error.filename}: {error.strerror}", hint="check its owner and permissions"
        ) from error


def _existing(kind: Literal["store", "download"], folder: Path) -> Iterator[RemovableFolder]:
    """Yield what an interrupted removal has left of the folder, then the folder. Links are left alone."""
    for path in (folder.with_name(folder.name + REMOVED_SUFFIX), folder):
        if path.is_dir() and not path.is_symlink():
            yield RemovableFolder(kind, path, _size_bytes(path))


def _is_of(folder: Path, source: str) -> bool:
    """Whether all stores in a folder were built from the source: names of different sources may be the same folder."""
    if not source.strip("/"):
        return False  # the root of the file system has no name: its folder is that of all stores
    files = [file for name in (MANIFEST_NAME, JOURNAL_NAME) for file in folder.glob(f"*/*/rank-*/{name}")]
    return {_read_origin(file) for file in files} <= {source, None}


def _read_origin(file: Path) -> str | None:
    """Return the repository or folder that a manifest or a journal names; None if it is unreadable."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.name == JOURNAL_NAME:
            return json.loads(text.partition("\n")[0])["repository"]
        return json.loads(text)["origin"]["repository"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
