"""Checkpoint source: a repository on the hub."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from kimi_mlx.errors import UnreachableError, WeightsError
from kimi_mlx.hub.cache import blob_path, cached_bytes, snapshot_folder, write_ref
from kimi_mlx.hub.client import (
    Repository,
    RepositoryFile,
    cached_file,
    fetch_file,
    fetch_to_cache,
    find_local,
    needed_files,
    read_range,
    remove_cached,
)
from kimi_mlx.hub.fetch import matches_checksum, read_file
from kimi_mlx.hub.partial_file import part_path
from kimi_mlx.model_files import is_small_file
from kimi_mlx.store.manifest import Origin
from kimi_mlx.store.sources import CheckpointContents, read_header_by_name
from kimi_mlx.weights.header import TensorInfo, parse_header
from kimi_mlx.weights.index import INDEX_NAME, missing_vision, parse_weight_map, vision_only_files

HEADER_WORKERS = 8
"""Number of headers that are fetched at the same time."""

HEADER_ATTEMPTS = 3
"""Number of downloads of a header that cannot be read."""


class HubSource:
    """A repository on the hub. Weight files are fetched one by one, and deleted after use unless they are kept.

    Args:
        repository: the repository, at a fixed commit.
        contents: contents from read_contents, possibly of another process.
        folder: folder for temporary files.
        keep: whether to fetch files into the hub's cache and keep them there.
        branch: branch for which the kept files are recorded in the hub's cache.
    """

    def __init__(
        self,
        repository: Repository,
        contents: CheckpointContents,
        folder: Path,
        keep: bool = False,
        branch: str = "main",
    ):
        self.contents = contents
        self._repository, self._folder, self._keep, self._branch = repository, folder, keep, branch

    @property
    def kept_bytes(self) -> int:
        """Bytes of the files that stay in the hub's cache because they were there before."""
        items = (self._repository.file(name) for name in self.contents.sizes)
        return 0 if self._keep else sum(item.size_bytes for item in items if cached_file(self._repository, item))

    def local_bytes(self, file: str) -> int:
        """Return the number of bytes of a file in the hub's cache or left by an interrupted build."""
        item, path = self._repository.file(file), self._folder / file
        if self._keep or cached_file(self._repository, item):
            return cached_bytes(self._repository, item)
        candidates = (candidate for candidate in (path, part_path(path)) if candidate.is_file())
        own_bytes = next((candidate.stat().st_size for candidate in candidates), 0)
        return own_bytes or cached_bytes(self._repository, item)

    def extra_bytes(self, files: Iterable[str]) -> int:
        """Return the size of the two largest missing files (of all if they are kept), minus their bytes on disk."""
        missing = [file for file in files if cached_file(self._repository, self._repository.file(file)) is None]
        sizes = sorted(self.contents.sizes[file] for file in missing)
        return max(0, sum(sizes if self._keep else sizes[-2:]) - sum(map(self.local_bytes, missing)))

    def fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        """Return a file from the hub's cache if its checksum is right, else fetch it from the hub.

        Raises:
            WeightsError: the file cannot be fetched, or its header is not the one that the build was planned with.
        """
        path = self._fetch(file, progress, stop)
        if read_header_by_name(path) != self.contents.headers[file]:  # it came without a checksum
            raise WeightsError(
                f"`{file}` of `{self._repository.name}` does not have the header that was received before",
                hint="run the same command again",
            )
        return path

    def _fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        item = self._repository.file(file)
        cached = cached_file(self._repository, item)
        if cached is not None and matches_checksum(cached, item, stop):
            progress(item.size_bytes)
            return cached
        if cached is not None:
            remove_cached(self._repository, item)
        if not self._keep:
            self._adopt_partial_download(item)
            fetch_file(self._repository, item, self._folder / file, progress, stop)
            return self._folder / file
        fetch_to_cache(self._repository, item, progress, stop)
        return snapshot_folder(self._repository) / file

    def _adopt_partial_download(self, item: RepositoryFile) -> None:
        """Move a partial download from the hub's cache into this source's folder, where fetch_file resumes it."""
        cached, own = part_path(blob_path(self._repository, item)), part_path(self._folder / item.name)
        if cached.is_file() and not own.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            # an OSError means a lock of another process or another disk; the file is then fetched from its start
            with contextlib.suppress(OSError), cached.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(cached, own)

    def release(self, file: str) -> None:
        """Delete the temporary file."""
        (self._folder / file).unlink(missing_ok=True)

    def finish(self) -> None:
        """Delete the temporary folder, and record the kept files in the hub's cache, where other tools find them."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._keep:
            for file in self._repository.files:
                if is_small_file(file.name) or file.name == INDEX_NAME:
                    fetch_to_cache(self._repository, file, lambda count: None, threading.Event())
            if find_local(self._repository.name) is None:  # do not replace a newer commit
                write_ref(replace(self._repository, revision=self._branch))

    def read(self, info: TensorInfo) -> bytes:
        """Read one tensor from the hub's cache, or from the hub by an HTTP range request."""
        file, stop = info.file.name, info.start + info.size_bytes
        path = cached_file(self._repository, self._repository.file(file))
        if path is None:
            return read_range(self._repository, file, info.start, stop)
        with path.open("rb") as stream:
            stream.seek(info.start)
            return stream.read(info.size_bytes)


def read_contents(repository: Repository) -> CheckpointContents:
    """Fetch the configuration, tokenizer and headers of a repository: a few megabytes.

    Raises:
        WeightsError: a file cannot be fetched, or the repository is not a checkpoint.
    """
    small_files = [file for file in repository.files if is_small_file(file.name)]
    index = next((file for file in repository.files if file.name == INDEX_NAME), None)
    with ThreadPoolExecutor(HEADER_WORKERS) as pool:
        small_contents = dict(pool.map(lambda file: (file.name, _read_small(repository, file)), small_files))
        where = f"{repository.name}/{INDEX_NAME}"
        weight_map = {} if index is None else parse_weight_map(_read_small(repository, index), where)
        origin = Origin(repository.name, repository.commit)
        vision_only = vision_only_files(weight_map)
        if vision_only and CheckpointContents(origin, {}, {}, small_contents).config().vision is None:
            repository = replace(repository, skips_vision=True)
        weights = [file for file in needed_files(repository, weight_map) if file.name.endswith(".safetensors")]
        if not weights:
            raise WeightsError(
                f"`{repository.name}` has no `model*.safetensors`", hint="give a repository that contains a model"
            )
        headers = dict(pool.map(lambda file: (file.name, _read_header(repository, file)), weights))
    sizes = {file.name: file.size_bytes for file in weights}
    skipped_bytes = sum(file.size_bytes for file in repository.files if file.name in vision_only - sizes.keys())
    lacks_vision = bool(missing_vision(weight_map, {name for header in headers.values() for name in header}))
    return CheckpointContents(origin, sizes, headers, small_contents, skipped_bytes, lacks_vision)


def _read_small(repository: Repository, file: RepositoryFile) -> bytes:
    path = cached_file(repository, file)
    if path is not None and matches_checksum(path, file, threading.Event()):
        return path.read_bytes()
    return read_file(repository, file)


def _read_header(repository: Repository, file: RepositoryFile) -> dict[str, TensorInfo]:
    """Return the header of a weight file. The hub has no checksum for it, so a broken one is requested again."""
    path = cached_file(repository, file)
    if path is not None:
        with contextlib.suppress(WeightsError):
            return read_header_by_name(path)
    attempts = 0
    while True:
        try:
            return parse_header(
                Path(file.name), file.size_bytes, lambda start, stop: read_range(repository, file.name, start, stop)
            )
        except UnreachableError:
            raise
        except WeightsError as error:
            attempts += 1
            if attempts == HEADER_ATTEMPTS:
                raise WeightsError(
                    f"{error.message} ({attempts} downloads of it from `{repository.name}`)",
                    hint="try again later, or over another network; or choose another repository",
                ) from error


def encode_contents(repository: Repository, contents: CheckpointContents) -> bytes:
    """Serialize a repository and its contents for another process."""
    headers = {
        file: {name: [info.dtype, list(info.shape), info.start] for name, info in header.items()}
        for file, header in contents.headers.items()
    }
    value = {
        "repository": repository.to_dict(),
        "sizes": dict(contents.sizes),
        "headers": headers,
        "small": {name: base64.b64encode(data).decode() for name, data in contents.small_files.items()},
        "skipped_bytes": contents.skipped_bytes,
        "lacks_vision": contents.lacks_vision,
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_contents(data: bytes) -> tuple[Repository, CheckpointContents]:
    """Decode the output of encode_contents."""
    value = json.loads(data)
    headers = {
        file: {
            name: TensorInfo(dtype, tuple(shape), Path(file), start) for name, (dtype, shape, start) in header.items()
        }
        for file, header in value["headers"].items()
    }
    small_files = {name: base64.b64decode(text) for name, text in value["small"].items()}
    repository = Repository.from_dict(value["repository"])
    origin = Origin(repository.name, repository.commit)
    skipped_bytes, lacks_vision = value["skipped_bytes"], value["lacks_vision"]
    contents = CheckpointContents(origin, value["sizes"], headers, small_files, skipped_bytes, lacks_vision)
    return repository, contents
