"""Names, sizes and checksums of the files of a repository. Reads no files and sends no requests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from kimi_mlx.errors import WeightsError
from kimi_mlx.weights.index import files_in_use, log_note, unlisted_of_series, vision_only_files


@dataclass(frozen=True)
class RepositoryFile:
    """One file of a repository.

    Args:
        name: path in the repository.
        size_bytes: size of the content.
        sha256: SHA-256 of the content; None for files that are not in large-file storage.
        blob_id: git's SHA-1; None for files in large-file storage.
    """

    name: str
    size_bytes: int
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit.

    Args:
        name: `owner/name`.
        commit: 40 hex digits.
        files: files of the model, sorted by name.
        revision: requested branch, tag or commit.
        is_local: whether the files are those in the cache, because the hub could not be asked.
        skips_vision: whether to leave out the files that have only tensors of the vision tower.
    """

    name: str
    commit: str
    files: tuple[RepositoryFile, ...]
    revision: str = "main"
    is_local: bool = False
    skips_vision: bool = False

    def file(self, name: str) -> RepositoryFile:
        """Return the file with this name.

        Raises:
            WeightsError: no such file.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise WeightsError(
            f"`{self.name}` has no file `{name}`", hint="choose a complete model: `kimi-mlx models` lists known ones"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the repository for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Repository:
        """Restore a repository from the result of `to_dict`."""
        files = tuple(RepositoryFile(**file) for file in value["files"])
        return cls(**{**value, "files": files})


class Checksum:
    """Checksum of a file, calculated as the hub does: SHA-256 in large-file storage, else git's SHA-1.

    Args:
        file: the file.
    """

    def __init__(self, file: RepositoryFile):
        self.expected = file.sha256 or file.blob_id
        if file.sha256:
            self._hash = hashlib.sha256()
        else:  # as git does: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects
            self._hash = hashlib.sha1(f"blob {file.size_bytes}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        """Add the next bytes."""
        self._hash.update(data)

    @property
    def actual(self) -> str:
        """Checksum of the bytes so far."""
        return self._hash.hexdigest()

    @property
    def is_valid(self) -> bool:
        """Whether the bytes have the hub's checksum; true if the hub lists none."""
        return self.expected is None or self.actual == self.expected.lower()


def needed_files(repository: Repository, weight_map: Mapping[str, str] | None) -> tuple[RepositoryFile, ...]:
    """Return the files that the model needs.

    An index whose files do not exist, or without files, is ignored with a note: all weight files are needed then. Files
    with only vision tensors may be missing.

    Args:
        repository: the repository.
        weight_map: tensor -> file, from `model.safetensors.index.json`; None or empty without a usable index.

    Raises:
        WeightsError: the index names files of which only some are in the repository.
    """
    if not weight_map:
        return repository.files
    in_use = files_in_use(weight_map)
    weights = {file.name for file in repository.files if file.name.endswith(".safetensors")}
    missing = sorted(in_use - weights)
    if missing and weights and not in_use & weights:
        log_note(f"the index of `{repository.name}` lists only files that do not exist: all weight files are used")
        return repository.files
    if missing:
        raise WeightsError(
            f"{len(missing)} of {len(in_use)} files in the index of `{repository.name}` do not exist, "
            f"first `{missing[0]}`",
            hint="choose a complete model: `kimi-mlx models` lists known ones",
        )
    vision = set[str]() if repository.skips_vision else vision_only_files(weight_map)
    skipped = weights - in_use - vision - unlisted_of_series(weight_map, weights)
    return tuple(file for file in repository.files if file.name not in skipped)
