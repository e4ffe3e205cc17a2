"""Checkpoint source: a folder on this machine."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from kimi_mlx.store.manifest import Origin
from kimi_mlx.store.sources import CheckpointContents, read_header_by_name
from kimi_mlx.weights.header import TensorInfo
from kimi_mlx.weights.index import checkpoint_files, lacks_vision, require_small_files

NUM_SAMPLES, SAMPLE_BYTES = 64, 4096
"""Samples of each file that a folder's digest covers, because files with equal headers may have other weights."""


class FolderSource:
    """A checkpoint's folder on this machine. Its files are read in place and never deleted.

    Raises:
        WeightsError: the folder is not a complete checkpoint.
    """

    def __init__(self, folder: Path):
        self._folder = folder.resolve()
        files = checkpoint_files(self._folder)
        headers = {file.name: read_header_by_name(file) for file in files}
        small_files = {name: (self._folder / name).read_bytes() for name in require_small_files(self._folder)}
        digest = hashlib.sha256(small_files.get("config.json", b""))
        for file in files:
            _hash_samples(file, digest)
        origin = Origin(str(self._folder), digest.hexdigest()[:40])
        sizes = {file.name: file.stat().st_size for file in files}
        is_without_vision = lacks_vision(self._folder, {name for header in headers.values() for name in header})
        self.contents = CheckpointContents(origin, sizes, headers, small_files, lacks_vision=is_without_vision)

    @property
    def kept_bytes(self) -> int:
        """0: the user's own folder is not reported as kept."""
        return 0

    def local_bytes(self, file: str) -> int:
        """Return the size of the file."""
        return self.contents.sizes[file]

    def extra_bytes(self, files: Iterable[str]) -> int:
        """Return 0: files are read in place."""
        return 0

    def fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        """Return the path of a file at once."""
        progress(self.contents.sizes[file])
        return self._folder / file

    def release(self, file: str) -> None:
        """Keep the file: it belongs to the user."""

    def finish(self) -> None:
        """Do nothing: a folder needs no cleanup."""

    def read(self, info: TensorInfo) -> bytes:
        """Read one tensor from its file."""
        with (self._folder / info.file.name).open("rb") as stream:
            stream.seek(info.start)
            return stream.read(info.size_bytes)


def _hash_samples(file: Path, digest: hashlib._Hash) -> None:
    """Add a file's name, size and samples to a digest. A copy on another host gets the same digest."""
    size = file.stat().st_size
    digest.update(f"{file.name} {size}\n".encode())
    with file.open("rb") as stream:
        for number in range(NUM_SAMPLES):
            stream.seek(max(0, (size - SAMPLE_BYTES) * number // (NUM_SAMPLES - 1)))
            digest.update(stream.read(SAMPLE_BYTES))
