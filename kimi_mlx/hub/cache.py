"""The Hugging Face cache on this machine, in huggingface_hub's layout: paths, links and references. Sends no requests.

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A repository's folder has `blobs/` (files by
checksum), `snapshots/<commit>/` (links to the blobs by file name), `refs/` (the commit of each branch) and
`.no_exist/<commit>/` (names of files that the repository does not have).
"""

from __future__ import annotations

import os
from pathlib import Path

from kimi_mlx.files import write_atomically
from kimi_mlx.hub.environment import constants, hub_cache
from kimi_mlx.hub.fetch import has_size
from kimi_mlx.hub.partial_file import part_path, xet_part_path
from kimi_mlx.hub.repository import Repository, RepositoryFile


def repository_folder(name: str) -> Path:
    """Return the folder of a repository, whether it exists or not."""
    return hub_cache() / constants().REPO_ID_SEPARATOR.join(("models", *name.split("/")))


def snapshot_folder(repository: Repository) -> Path:
    """Return the folder with the files of one commit under their names."""
    return repository_folder(repository.name) / "snapshots" / repository.commit


def blob_path(repository: Repository, file: RepositoryFile) -> Path:
    """Return the path of a file's content."""
    key = file.sha256 or file.blob_id or f"{repository.commit}-{file.name.replace('/', '--')}"
    return repository_folder(repository.name) / "blobs" / key


def cached_file(repository: Repository, file: RepositoryFile) -> Path | None:
    """Return the path of the file at that commit; None if it is missing or has the wrong size."""
    path = snapshot_folder(repository) / file.name
    return path if has_size(path, file) else None


def cached_bytes(repository: Repository, file: RepositoryFile) -> int:
    """Return the number of bytes of a file that are already on disk."""
    blob = blob_path(repository, file)
    if cached_file(repository, file) or has_size(blob, file):
        return file.size_bytes
    part = part_path(blob)
    return min(part.stat().st_size, file.size_bytes) if part.is_file() else 0


def link_blob(repository: Repository, file: RepositoryFile) -> None:
    """Link a blob into the snapshot under its file name. On a disk without symbolic links, move the blob there."""
    blob, pointer = blob_path(repository, file), snapshot_folder(repository) / file.name
    pointer.parent.mkdir(parents=True, exist_ok=True)
    if constants().HF_HUB_DISABLE_SYMLINKS:
        os.replace(blob, pointer)
        return
    target = os.path.relpath(blob, pointer.parent)
    if pointer.is_symlink() and os.readlink(pointer) == target:  # another process may be reading it
        return
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(target)
    except FileExistsError:  # another process was faster
        return
    except OSError:
        os.replace(blob, pointer)


def write_ref(repository: Repository) -> None:
    """Record the commit of the branch or tag. This is the last step: until then, an older snapshot is found."""
    if repository.revision == repository.commit:
        return
    reference = repository_folder(repository.name) / "refs" / repository.revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(reference, repository.commit.encode())


def remove_cached(repository: Repository, file: RepositoryFile) -> None:
    """Remove a file from the snapshot and the blobs, so that the next fetch downloads it again."""
    blob = blob_path(repository, file)
    for path in (snapshot_folder(repository) / file.name, blob, part_path(blob), xet_part_path(blob)):
        path.unlink(missing_ok=True)
