"""What a repository on the hub holds: names, sizes and checksums. Pure: nothing is asked and no file is read here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from kimi_mlx.errors import WeightsError
from kimi_mlx.weights.index import files_in_use

FILES = ["*.json", "model*.safetensors", "tiktoken.model", "*.jinja"]
"""What a model needs of a repository: never its Python code."""


@dataclass(frozen=True)
class RepositoryFile:
    """One file of a repository.

    Args:
        name: without a folder.
        size_bytes: its size.
        sha256: of its bytes, for files in large-file storage.
        blob_id: git's sha1, for the others.
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
        files: those at the top that match FILES, by name.
        revision: the branch or tag that was asked for; the commit itself if that was asked for.
    """

    name: str
    commit: str
    files: tuple[RepositoryFile, ...]
    revision: str = "main"

    def file(self, name: str) -> RepositoryFile:
        """The file of that name.

        Raises:
            WeightsError: there is none.
        """
        for file in self.files:
            if file.name == name:
                return file
        raise WeightsError(
            f"`{self.name}` has no file `{name}`", hint="choose a complete model: `kimi-mlx models` lists known ones"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Repository:
        """From what `to_dict` returned, after its way through JSON."""
        files = tuple(RepositoryFile(**file) for file in value["files"])
        return cls(**{**value, "files": files})


class Checksum:
    """Of a file's bytes as they come, by the method that the hub has for this file.

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
        """Take the next bytes."""
        self._hash.update(data)

    @property
    def actual(self) -> str:
        """Of the bytes so far."""
        return self._hash.hexdigest()

    @property
    def is_valid(self) -> bool:
        """Whether it is what the hub says; true if the hub says nothing."""
        return self.expected is None or self.actual == self.expected.lower()


def is_model_file(name: str) -> bool:
    """Whether a file of a repository, named with its folders, is one of FILES."""
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in FILES)


def needed_files(repository: Repository, weight_map: Mapping[str, str] | None) -> tuple[RepositoryFile, ...]:
    """The files that the text model needs.

    Args:
        repository: where they are.
        weight_map: of `model.safetensors.index.json`, from tensor to file; None if there is no index: then all.

    Raises:
        WeightsError: the index names a file that the repository does not have.
    """
    if weight_map is None:
        return repository.files
    in_use = files_in_use(weight_map)
    if missing := sorted(in_use - {file.name for file in repository.files}):
        raise WeightsError(
            f"{len(missing)} of {len(in_use)} files in the index of `{repository.name}` are not in the repository, "
            f"first `{missing[0]}`",
            hint="choose a complete model: `kimi-mlx models` lists known ones",
        )
    return tuple(file for file in repository.files if not file.name.endswith(".safetensors") or file.name in in_use)
