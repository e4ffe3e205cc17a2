"""Models on the Hugging Face Hub: list the files of a repository, and download them into the Hugging Face cache.

Other packages import from this module. huggingface_hub is imported inside functions, because that takes half a second.
"""

from __future__ import annotations

import shlex
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kimi_mlx.errors import KimiMlxError, WeightsError
from kimi_mlx.hub.cache import (
    blob_path,
    cached_bytes,
    cached_file,
    link_blob,
    remove_cached,
    snapshot_folder,
    write_ref,
)
from kimi_mlx.hub.error_messages import SPACE_HINT, disk_error
from kimi_mlx.hub.fetch import fetch_file, matches_checksum, read_range
from kimi_mlx.hub.look_up import find_repository, look_up
from kimi_mlx.hub.partial_file import Progress, ignore_progress
from kimi_mlx.hub.repository import Repository, RepositoryFile, needed_files
from kimi_mlx.hub.retries import LOG
from kimi_mlx.hub.snapshots import find_local, is_complete, record_absent_files, unknown_files
from kimi_mlx.hub.threads import for_each
from kimi_mlx.model.config import load_config
from kimi_mlx.units import format_bytes
from kimi_mlx.weights.index import INDEX_NAME, lacks_vision, read_weight_map

__all__ = [
    "Progress",
    "Repository",
    "RepositoryFile",
    "cached_file",
    "complete_checkpoint",
    "fetch_checkpoint",
    "fetch_file",
    "fetch_to_cache",
    "find_local",
    "find_repository",
    "is_complete",
    "look_up",
    "needed_files",
    "read_range",
    "remove_cached",
    "verify_checkpoint",
]


def fetch_checkpoint(repository: Repository, progress: Progress = ignore_progress, workers: int = 4) -> Path:
    """Download the files that a model needs. The configuration comes first, to refuse unsupported models early.

    Args:
        repository: repository to download.
        progress: callback for the number of new bytes, including those already on disk; never called concurrently.
        workers: number of files that are downloaded at the same time.

    Returns:
        The folder in the Hugging Face cache.

    Raises:
        ConfigError: unsupported model.
        WeightsError: the download failed, or the disk is too small.
    """
    folder, lock, never = snapshot_folder(repository), threading.Lock(), threading.Event()

    def report(count: int) -> None:
        with lock:
            progress(count)

    def fetch_one(file: RepositoryFile, stop: threading.Event) -> None:
        fetch_to_cache(repository, file, report, stop)

    try:
        fetch_one(repository.file("config.json"), never)
        load_config(folder)
        first = [file for file in repository.files if file.name == INDEX_NAME]
        for file in first:
            fetch_one(file, never)
        rest = [file for file in _needed_files(repository) if file.name not in ("config.json", INDEX_NAME)]
        _require_space(repository, rest)
        rest.sort(key=lambda file: file.name.endswith(".safetensors"))  # weights last
        for_each(fetch_one, rest, workers)
        if not repository.is_local:
            record_absent_files(repository)
        write_ref(repository)
    except OSError as error:
        raise disk_error(error, folder) from error
    return folder


def complete_checkpoint(name: str, snapshot: Path, fetch: Callable[[Repository], Path] = fetch_checkpoint) -> Path:
    """Fetch the optional files of a snapshot if any may be missing; if that fails, log a note.

    A vision tower that is missing is not among them: `kimi-mlx download` fetches it.

    Args:
        name: `owner/name`.
        snapshot: complete snapshot in the cache, or any other folder, which stays as it is.
        fetch: function that fetches a repository.

    Returns:
        The snapshot.
    """
    missing = ", ".join(unknown_files(snapshot))
    if missing:
        try:
            repository = look_up(name, snapshot.name, max_wait_s=0)
            return fetch(replace(repository, skips_vision=lacks_vision(snapshot)))
        except KimiMlxError as error:
            reason = error.message.rpartition("cannot be downloaded: ")[2]
            LOG.warning("note: `%s` may lack %s (%s); `kimi-mlx download %s` fetches it", name, missing, reason, name)
    return snapshot


def fetch_to_cache(
    repository: Repository,
    file: RepositoryFile,
    progress: Progress = ignore_progress,
    stop: threading.Event | None = None,
) -> Path:
    """Download one file into the Hugging Face cache, as fetch_file does, and return its path there."""
    path = snapshot_folder(repository) / file.name
    for target in (path, blob_path(repository, file)):
        if target.is_dir() and not target.is_symlink():
            raise WeightsError(
                f"`{target}` is a folder, but must be a file",
                hint=f"`rm -r {shlex.quote(str(target))}`, then run the same command again",
            )
    if cached_file(repository, file):
        progress(file.size_bytes)
        return path
    fetch_file(repository, file, blob_path(repository, file), progress, stop)
    try:
        link_blob(repository, file)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def verify_checkpoint(
    repository: Repository, progress: Progress = ignore_progress, workers: int = 4
) -> list[RepositoryFile]:
    """Return the files that are missing, truncated or corrupt in the Hugging Face cache.

    Args:
        repository: repository to verify, except files that the model does not need.
        progress: callback for the number of newly read bytes; never called concurrently.
        workers: number of files that are read at the same time.
    """
    lock, corrupt = threading.Lock(), list[RepositoryFile]()

    def report(count: int) -> None:
        with lock:
            progress(count)

    def verify(file: RepositoryFile, stop: threading.Event) -> None:
        path = cached_file(repository, file)
        if path is None or not _is_valid(path, file, stop, report):
            corrupt.append(file)

    try:
        files = _needed_files(repository)
    except KimiMlxError:  # the index is corrupt; it is verified like the other files
        files = repository.files
    for_each(verify, files, workers)
    return sorted(corrupt, key=lambda file: file.name)


def _is_valid(path: Path, file: RepositoryFile, stop: threading.Event, progress: Progress) -> bool:
    try:
        return matches_checksum(path, file, stop, progress)
    except OSError:  # unreadable on disk
        return False


def _needed_files(repository: Repository) -> tuple[RepositoryFile, ...]:
    """Return the needed files according to the cached index, if the repository has one, and the configuration."""
    folder = snapshot_folder(repository)
    has_index = any(file.name == INDEX_NAME for file in repository.files)
    weight_map = read_weight_map(folder / INDEX_NAME) if has_index else None
    return needed_files(repository if _uses_vision(folder) else replace(repository, skips_vision=True), weight_map)


def _uses_vision(folder: Path) -> bool:
    """Return whether a configuration has a vision tower; false if it is unreadable, so that it is fetched first."""
    try:
        return load_config(folder).vision is not None
    except KimiMlxError:
        return False


def _require_space(repository: Repository, files: list[RepositoryFile]) -> None:
    missing_bytes = sum(file.size_bytes - cached_bytes(repository, file) for file in files)
    folder = snapshot_folder(repository)
    free_bytes = shutil.disk_usage(folder).free
    if missing_bytes > free_bytes:
        raise WeightsError(
            f"`{repository.name}` needs {format_bytes(missing_bytes)} more, but the disk of `{folder}` has only "
            f"{format_bytes(free_bytes)} free",
            hint=SPACE_HINT,
        )
