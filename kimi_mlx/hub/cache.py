"""The hub's cache on this machine, laid out as huggingface_hub does; nothing is asked of the hub here.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A repository's folder has `blobs/` (files by
their checksum), `snapshots/<commit>/` (links to them by name) and `refs/` (the commit of each branch).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kimi_mlx.errors import KimiMlxError
from kimi_mlx.hub.fetch import has_size
from kimi_mlx.hub.partial_file import part_path, xet_part_path
from kimi_mlx.hub.repository import Repository, RepositoryFile
from kimi_mlx.weights.index import checkpoint_files

COMMIT = re.compile(r"[0-9a-f]{40}")


def repository_folder(name: str) -> Path:
    """Where all of a repository lies, whether it does or not."""
    from huggingface_hub import constants

    parts = ("models", *name.split("/"))
    return Path(constants.HF_HUB_CACHE).expanduser() / constants.REPO_ID_SEPARATOR.join(parts)


def snapshot_folder(repository: Repository) -> Path:
    """Where the files of one commit lie under their names."""
    return repository_folder(repository.name) / "snapshots" / repository.commit


def blob_path(repository: Repository, file: RepositoryFile) -> Path:
    """Where a file's bytes lie."""
    key = file.sha256 or file.blob_id or f"{repository.commit}-{file.name}"
    return repository_folder(repository.name) / "blobs" / key


def cached_file(repository: Repository, file: RepositoryFile) -> Path | None:
    """The file at that commit, None if it is not there with the right size."""
    path = snapshot_folder(repository) / file.name
    return path if has_size(path, file) else None


def cached_bytes(repository: Repository, file: RepositoryFile) -> int:
    """How much of a file is there already."""
    blob = blob_path(repository, file)
    if cached_file(repository, file) or has_size(blob, file):
        return file.size_bytes
    part = part_path(blob)
    return min(part.stat().st_size, file.size_bytes) if part.is_file() else 0


def find_local(name: str, revision: str | None = None) -> Path | None:
    """The folder of a repository in the hub's cache, None if it is not there as a whole."""
    folder = repository_folder(name)
    revision = revision or "main"
    try:
        is_commit = COMMIT.fullmatch(revision) is not None
        commit = revision if is_commit else (folder / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):  # no such file, or a name that no file can have
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and is_complete(snapshot) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has all that a model needs; a download that was broken off leaves some of it."""
    try:
        checkpoint_files(folder)
    except KimiMlxError:
        return False
    has_tokenizer = any((folder / name).is_file() for name in ("tiktoken.model", "tokenizer.json"))
    return has_tokenizer and (folder / "config.json").is_file()


def link_blob(repository: Repository, file: RepositoryFile) -> None:
    """Give a blob its name in the snapshot; on a disk without links, the blob itself moves there."""
    from huggingface_hub import constants

    blob, pointer = blob_path(repository, file), snapshot_folder(repository) / file.name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if constants.HF_HUB_DISABLE_SYMLINKS:
        os.replace(blob, pointer)
        return
    aim = os.path.relpath(blob, pointer.parent)
    if pointer.is_symlink() and os.readlink(pointer) == aim:  # another process may be reading it
        return
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(aim)
    except FileExistsError:  # another process did it meanwhile
        return
    except OSError:
        os.replace(blob, pointer)


def write_ref(repository: Repository) -> None:
    """Write down that the branch or tag is at this commit, as the last step: an older snapshot is found until then."""
    if repository.revision == repository.commit:
        return
    reference = repository_folder(repository.name) / "refs" / repository.revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    new = reference.with_name(f"{reference.name}.{os.getpid()}.tmp")
    new.write_text(repository.commit, encoding="utf-8")
    os.replace(new, reference)


def remove_cached(repository: Repository, file: RepositoryFile) -> None:
    """Drop a file, under its name and as a blob, so that the next fetch gets it again."""
    blob = blob_path(repository, file)
    for path in (snapshot_folder(repository) / file.name, blob, part_path(blob), xet_part_path(blob)):
        path.unlink(missing_ok=True)
