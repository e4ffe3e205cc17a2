"""Sources of a checkpoint's files while stores are built: a folder, or the hub."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, cast

from kimi_mlx.errors import WeightsError
from kimi_mlx.hub.cache import blob_path, cached_bytes, snapshot_folder, write_ref
from kimi_mlx.hub.client import (
    FILES,
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
from kimi_mlx.hub.fetch import matches_checksum
from kimi_mlx.hub.partial_file import part_path
from kimi_mlx.model.config import ModelConfig, parse_config
from kimi_mlx.model.names import IGNORED_PREFIXES
from kimi_mlx.store.manifest import Origin
from kimi_mlx.weights.index import INDEX_NAME, TensorInfo, checkpoint_files, parse_header, read_header, read_weight_map

HEADER_WORKERS = 8
"""Headers that are read at the same time."""

SAMPLES, SAMPLE_BYTES = 64, 4096
"""What of each file of a folder tells it from another one with the same headers."""

Headers = Mapping[str, Mapping[str, TensorInfo]]
"""File name -> its tensors."""


@dataclass(frozen=True)
class CheckpointContents:
    """A checkpoint without the tensors themselves.

    Args:
        origin: repository and commit.
        sizes: bytes of each file with tensors, by name.
        headers: their tensors.
        small: the other files a model needs: configuration, tokenizer, template.
        vision_bytes: of files that hold nothing but vision and are left out.
    """

    origin: Origin
    sizes: Mapping[str, int]
    headers: Headers
    small_files: Mapping[str, bytes]
    vision_bytes: int = 0

    @property
    def table(self) -> dict[str, TensorInfo]:
        """All tensors; their files are bare names.

        Raises:
            WeightsError: a name that occurs twice.
        """
        table: dict[str, TensorInfo] = {}
        for file, header in self.headers.items():
            for name, info in header.items():
                if name in table:
                    raise WeightsError(f"tensor `{name}` is in `{table[name].file.name}` and in `{file}`")
                table[name] = info
        return table

    def config(self) -> ModelConfig:
        """The model's configuration."""
        where = f"{self.origin.repository}/config.json"
        if "config.json" not in self.small_files:
            raise WeightsError(f"`{where}` does not exist", hint="give a repository or folder that holds a model")
        try:
            raw = json.loads(self.small_files["config.json"])
        except ValueError as error:
            raise WeightsError(f"`{where}` is not JSON: {error}", hint="fetch the file again") from error
        if not isinstance(raw, dict):
            raise WeightsError(f"`{where}` holds {type(raw).__name__}, not an object", hint="fetch the file again")
        return parse_config(cast(dict[str, Any], raw), where)


class CheckpointSource(Protocol):
    """The files with tensors, fetched when they are needed."""

    contents: CheckpointContents

    @property
    def kept_bytes(self) -> int:
        """Bytes of source files that stay on this machine although `keep` is off."""
        ...

    def local_bytes(self, file: str) -> int:
        """Return the bytes of a file that are already on this machine."""
        ...

    def extra_bytes(self, files: Iterable[str]) -> int:
        """Return the disk space that these files need while they are fetched, or for good if they are kept."""
        ...

    def fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        """Where the file lies, complete and verified; `progress` gets the bytes as they come, `stop` calls it off."""
        ...

    def release(self, file: str) -> None:
        """Free a file that is no longer needed."""
        ...

    def finish(self) -> None:
        """Clean up after a build."""
        ...

    def read(self, info: TensorInfo) -> bytes:
        """Read one small tensor of a file that is not fetched here."""
        ...


class FolderSource:
    """A checkpoint's folder on this machine; files are neither fetched nor removed."""

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        files = checkpoint_files(self._folder)
        headers = {file.name: _bare(read_header(file), file.name) for file in files}
        small = {
            path.name: path.read_bytes()
            for path in sorted(self._folder.iterdir())
            if path.is_file() and is_small_file(path.name)
        }
        digest = hashlib.sha256(small.get("config.json", b""))
        for file in files:
            _sample(file, digest)
        origin = Origin(str(self._folder), digest.hexdigest()[:40])
        self.contents = CheckpointContents(origin, {file.name: file.stat().st_size for file in files}, headers, small)

    @property
    def kept_bytes(self) -> int:
        """A folder of the user is left alone, and that is no surprise."""
        return 0

    def local_bytes(self, file: str) -> int:
        """All of it."""
        return self.contents.sizes[file]

    def extra_bytes(self, files: Iterable[str]) -> int:
        """None."""
        return 0

    def fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        """It is there."""
        progress(self.contents.sizes[file])
        return self._folder / file

    def release(self, file: str) -> None:
        """It stays."""

    def finish(self) -> None:
        """Nothing is left over."""

    def read(self, info: TensorInfo) -> bytes:
        """From the file."""
        with (self._folder / info.file.name).open("rb") as stream:
            stream.seek(info.start)
            return stream.read(info.size_bytes)


def _sample(file: Path, digest: hashlib._Hash) -> None:
    """Take a file into a digest: name, size, and pieces from all over it; the same for a copy on another host."""
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as stream:
        for number in range(SAMPLES):
            stream.seek(max(0, (size - SAMPLE_BYTES) * number // (SAMPLES - 1)))
            digest.update(stream.read(SAMPLE_BYTES))


class HubSource:
    """A repository on the hub; files are fetched temporarily.

    Args:
        repository: its files, pinned to a commit.
        contents: from read_contents, possibly by another process.
        folder: where files are put while they are needed.
        keep: whether they go to the hub's cache instead, and stay.
        branch: under which other tools shall find what was kept.
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
        """Files that were in the hub's cache before stay there."""
        items = (self._repository.file(name) for name in self.contents.sizes)
        return 0 if self._keep else sum(item.size_bytes for item in items if cached_file(self._repository, item))

    def local_bytes(self, file: str) -> int:
        """Of the hub's cache, or of an earlier try."""
        item, path = self._repository.file(file), self._folder / file
        if self._keep or cached_file(self._repository, item):
            return cached_bytes(self._repository, item)
        own = next((each.stat().st_size for each in (path, part_path(path)) if each.is_file()), 0)
        return own or cached_bytes(self._repository, item)

    def extra_bytes(self, files: Iterable[str]) -> int:
        """Two files at a time, the largest ones; all, if they are kept; less what is here already."""
        missing = [file for file in files if cached_file(self._repository, self._repository.file(file)) is None]
        sizes = sorted(self.contents.sizes[file] for file in missing)
        return max(0, sum(sizes if self._keep else sizes[-2:]) - sum(map(self.local_bytes, missing)))

    def fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        """From the hub's cache if it is there, else from the hub."""
        item = self._repository.file(file)
        cached = cached_file(self._repository, item)
        if cached is not None and matches_checksum(cached, item, stop):
            progress(item.size_bytes)
            return cached
        if cached is not None:
            remove_cached(self._repository, item)
        if not self._keep:
            self._take_over(item)
            fetch_file(self._repository, item, self._folder / file, progress, stop)
            return self._folder / file
        fetch_to_cache(self._repository, item, progress, stop)
        return snapshot_folder(self._repository) / file

    def _take_over(self, item: RepositoryFile) -> None:
        """Resume a partial download in the hub's cache."""
        begun, own = part_path(blob_path(self._repository, item)), part_path(self._folder / item.name)
        if begun.is_file() and not own.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            # another process is at it, or it is on another disk: then the file is fetched from the start
            with contextlib.suppress(OSError), begun.open("rb") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(begun, own)

    def release(self, file: str) -> None:
        """Remove a temporary file."""
        (self._folder / file).unlink(missing_ok=True)

    def finish(self) -> None:
        """Remove the folder; let other tools find what was kept."""
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._keep:
            for file in self._repository.files:
                if is_small_file(file.name) or file.name == INDEX_NAME:
                    fetch_to_cache(self._repository, file, lambda count: None, threading.Event())
            if find_local(self._repository.name) is None:  # never an older commit in place of a newer one
                write_ref(replace(self._repository, revision=self._branch))

    def read(self, info: TensorInfo) -> bytes:
        """By a request for its bytes alone."""
        return read_range(self._repository, info.file.name, info.start, info.start + info.size_bytes)


def read_contents(repository: Repository) -> CheckpointContents:
    """Configuration, tokenizer and headers of a repository: what decides everything else, a few megabytes.

    Raises:
        WeightsError: the repository cannot be fetched, or is not a checkpoint.
    """
    small = {file.name: file for file in repository.files if is_small_file(file.name)}
    index = next((file for file in repository.files if file.name == INDEX_NAME), None)
    with tempfile.TemporaryDirectory(prefix="kimi-mlx-") as name, ThreadPoolExecutor(HEADER_WORKERS) as pool:
        folder = Path(name)

        def read_small(file: RepositoryFile) -> bytes:
            path = cached_file(repository, file)
            if path is None:
                path = folder / file.name
                fetch_file(repository, file, path)
            return path.read_bytes()

        def read_tensors(file: RepositoryFile) -> tuple[str, dict[str, TensorInfo]]:
            header = parse_header(
                Path(file.name), file.size_bytes, lambda start, stop: read_range(repository, file.name, start, stop)
            )
            return file.name, header

        texts = dict(zip(small, pool.map(read_small, small.values()), strict=True))
        weight_map = None
        if index is not None:
            (folder / INDEX_NAME).write_bytes(read_small(index))
            weight_map = read_weight_map(folder / INDEX_NAME)
        weights = [file for file in needed_files(repository, weight_map) if file.name.endswith(".safetensors")]
        if not weights:
            raise WeightsError(
                f"`{repository.name}` has no `model*.safetensors`", hint="give a repository that holds a model"
            )
        headers = dict(pool.map(read_tensors, weights))
    sizes = {file.name: file.size_bytes for file in weights}
    vision = {file for name, file in (weight_map or {}).items() if name.startswith(IGNORED_PREFIXES)}
    vision_bytes = sum(file.size_bytes for file in repository.files if file.name in vision - sizes.keys())
    return CheckpointContents(Origin(repository.name, repository.commit), sizes, headers, texts, vision_bytes)


def is_small_file(name: str) -> bool:
    """Return whether a file is copied into a store unchanged: configuration, tokenizer, template."""
    return any(fnmatch(name, pattern) for pattern in FILES) and not name.endswith((".safetensors", ".index.json"))


def encode_contents(repository: Repository, contents: CheckpointContents) -> bytes:
    """Serialize repository and contents for another process."""
    headers = {
        file: {name: [info.dtype, list(info.shape), info.start] for name, info in header.items()}
        for file, header in contents.headers.items()
    }
    value = {
        "repository": repository.to_dict(),
        "sizes": dict(contents.sizes),
        "headers": headers,
        "small": {name: base64.b64encode(data).decode() for name, data in contents.small_files.items()},
        "vision_bytes": contents.vision_bytes,
    }
    return json.dumps(value, separators=(",", ":")).encode()


def decode_contents(data: bytes) -> tuple[Repository, CheckpointContents]:
    """Read the output of encode_contents."""
    value = json.loads(data)
    headers = {
        file: {
            name: TensorInfo(dtype, tuple(shape), Path(file), start) for name, (dtype, shape, start) in header.items()
        }
        for file, header in value["headers"].items()
    }
    small = {name: base64.b64decode(text) for name, text in value["small"].items()}
    repository = Repository.from_dict(value["repository"])
    origin = Origin(repository.name, repository.commit)
    return repository, CheckpointContents(origin, value["sizes"], headers, small, value["vision_bytes"])


def _bare(header: Mapping[str, TensorInfo], file: str) -> dict[str, TensorInfo]:
    return {name: TensorInfo(info.dtype, info.shape, Path(file), info.start) for name, info in header.items()}
