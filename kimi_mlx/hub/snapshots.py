"""Snapshots in the Hugging Face cache: find them, and list their missing files. Sends no requests.

Caches in practice lack parts of the layout: copies have files instead of links, or broken links; a download by commit
has no `refs/`; an interrupted one has some of the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

from kimi_mlx.errors import KimiMlxError
from kimi_mlx.files import read_regular_file
from kimi_mlx.hub.cache import repository_folder, snapshot_folder
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.model_files import KNOWN_NAMES, is_model_file, list_small_files, missing_optional, missing_required
from kimi_mlx.weights.header import read_header
from kimi_mlx.weights.index import checkpoint_files

COMMIT = re.compile(r"[0-9a-f]{40}")
SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")
SHA256 = re.compile(r"[0-9a-f]{64}")
WEIGHTS_NAME = re.compile(r"`([^`/]+\.safetensors)`")
MAX_LINK_BYTES = 200


def find_local(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a repository in the cache with all files that a model requires; None if there is none.

    Optional files may still be missing: see `unknown_files`.

    Args:
        name: `owner/name`.
        revision: branch, tag, or commit of at least 7 digits; None for the main branch, or, if the cache does not say
            which commit that is, the commit that was downloaded last.
    """
    snapshot = _snapshot_of(name, revision or "main")
    if snapshot is not None:
        return snapshot if is_complete(snapshot) else None
    return newest_complete(name) if revision is None else None


def newest_complete(name: str) -> Path | None:
    """Return the complete snapshot of a repository, of any commit, that was downloaded last; None if there is none."""
    return next((snapshot for snapshot in _snapshots(name) if is_complete(snapshot)), None)


def _snapshots(name: str) -> list[Path]:
    """Return the snapshots of a repository, newest first."""
    try:
        folders = [path for path in (repository_folder(name) / "snapshots").iterdir() if COMMIT.fullmatch(path.name)]
    except (OSError, ValueError):  # no such folder, or an invalid name
        return []
    changed_s: dict[Path, float] = {}
    for path in folders:
        with contextlib.suppress(OSError):  # a broken link
            changed_s[path] = path.stat().st_mtime
    return sorted(changed_s, key=lambda path: -changed_s[path])


def _snapshot_of(name: str, revision: str) -> Path | None:
    """Return the snapshot of a revision, complete or not; None if the revision or its snapshot is not in the cache."""
    if SHORT_COMMIT.fullmatch(revision):
        return next((path for path in _snapshots(name) if path.name.startswith(revision)), None)
    folder = repository_folder(name)
    try:
        text = read_regular_file(folder / "refs" / revision).decode("utf-8-sig")  # editors add a BOM or a newline
    except (OSError, ValueError):  # no such file, or an invalid file name
        return None
    commit = text.strip().lower()
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def is_complete(snapshot: Path) -> bool:
    """Return whether a snapshot has all files that a model requires, except those known not to be in the repository."""
    return not missing_files(snapshot)


def missing_files(snapshot: Path) -> list[str]:
    """Return the required files that are missing; of the weights only the first."""
    missing = [" or ".join(group) for group in missing_required(snapshot) if not _is_known_absent(snapshot, group)]
    missing += [path.name for path in sorted(snapshot.iterdir()) if _is_copied_link(path)] if snapshot.is_dir() else []
    try:
        checkpoint_files(snapshot)
    except KimiMlxError as error:
        named = WEIGHTS_NAME.findall(error.message)
        missing.append(named[0] if named else "model*.safetensors")
    return missing


def _is_copied_link(path: Path) -> bool:
    """Return whether a file contains the target of a link as text: copies to disks without links have such files."""
    try:
        if path.is_symlink() or path.stat().st_size > MAX_LINK_BYTES:
            return False
        return read_regular_file(path).startswith(b"../../blobs/")
    except OSError:  # a folder, a pipe, or unreadable
        return False


def damaged_files(snapshot: Path) -> list[str]:
    """Return the files of a complete snapshot that are truncated or unreadable. Reads small files and headers."""
    names = list_small_files(snapshot)
    damaged = [name for name in names if not _is_plausible(snapshot / name)]
    for path in checkpoint_files(snapshot):
        try:
            read_header(path)
        except KimiMlxError:
            damaged.append(path.name)
    return damaged


def _is_plausible(path: Path) -> bool:
    """Return whether a small file is not empty, and JSON if its name says so."""
    try:
        data = read_regular_file(path)
        if path.suffix == ".json":
            json.loads(data)
    except (OSError, ValueError, RecursionError):
        return False
    return bool(data)


def unknown_files(snapshot: Path) -> list[str]:
    """Return the optional files that are missing, although the repository may have them.

    Args:
        snapshot: snapshot in the cache; for any other folder nothing is returned.
    """
    if snapshot.parent.name != "snapshots":
        return []
    return [" or ".join(group) for group in missing_optional(snapshot) if not _is_known_absent(snapshot, group)]


def _is_known_absent(snapshot: Path, names: tuple[str, ...]) -> bool:
    absent = _absence_folder(snapshot)
    return all((absent / name).exists() for name in names)


def _absence_folder(snapshot: Path) -> Path:
    return snapshot.parent.parent / ".no_exist" / snapshot.name


def record_absent_files(repository: Repository) -> None:
    """Record which of the known files the repository does not have, so that they do not count as missing."""
    absent = _absence_folder(snapshot_folder(repository))
    with contextlib.suppress(OSError):  # a read-only cache: the hub is asked again next time
        for name in {*KNOWN_NAMES} - {file.name for file in repository.files}:
            absent.mkdir(parents=True, exist_ok=True)
            (absent / name).touch()


def describe_local(name: str, revision: str | None) -> str:
    """Describe which part of a repository is in the cache, as the predicate of a sentence.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
    """
    folder = repository_folder(name)
    for path in (folder.parent, folder, folder / "snapshots"):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.X_OK):
            return f"cannot be read on this machine (no permission for `{path}`)"
    snapshot = _snapshot_of(name, revision or "main")
    if snapshot is None and revision is not None and _snapshots(name):
        return f"is not on this machine at revision `{revision}`"
    snapshot = snapshot or next(iter(_snapshots(name)), None)
    if snapshot is None:
        return "is not on this machine"
    if missing := missing_files(snapshot):
        return f"is only partly on this machine (missing: {', '.join(missing)})"
    if damaged := damaged_files(snapshot):
        return f"has damaged files on this machine ({', '.join(damaged)})"
    unknown = ", ".join(unknown_files(snapshot))
    return f"may lack {unknown} on this machine" if unknown else "is on this machine"


def local_repository(snapshot: Path, name: str) -> Repository:
    """Return a snapshot's files as a repository. Checksums are known where a link names a blob by its sha256."""
    files: list[RepositoryFile] = []
    for path in (path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        file_name = path.relative_to(snapshot).as_posix()
        if is_model_file(file_name):
            blob = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
            files.append(RepositoryFile(file_name, path.stat().st_size, blob if SHA256.fullmatch(blob) else None))
    return Repository(name, snapshot.name, tuple(files), snapshot.name, is_local=True)
