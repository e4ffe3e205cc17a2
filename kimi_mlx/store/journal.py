"""Journal of a rank's store: one JSON line for each step of the build, flushed to disk, so that a build can resume.

The first line identifies the store; `{"source": N}` records a source file that is written completely, `{"file": N,
"name": ..., "size_bytes": ..., "sha256": ...}` a finished file of the store. Earlier versions wrote no name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import rename_durably
from kimi_mlx.store.disk import write_error
from kimi_mlx.store.manifest import FORMAT, READABLE_FORMATS, StoredFile
from kimi_mlx.store.store_folders import JOURNAL_NAME, RECORDS_SUFFIX, folder_prefix, is_same_source, source_folder


@dataclass(frozen=True)
class BuildState:
    """State of an earlier build.

    Args:
        sources: numbers of the source files whose slices have all been written.
        checksums: number and name of a finished file -> its sha256; no name if an earlier version recorded it.
    """

    sources: set[int] = field(default_factory=set[int])
    checksums: dict[tuple[int, str | None], str] = field(default_factory=dict[tuple[int, str | None], str])

    def checksum(self, number: int, name: str) -> str | None:
        """Return the checksum of a finished file; None if it was not recorded."""
        is_earlier = not name.endswith(RECORDS_SUFFIX)
        return self.checksums.get((number, name)) or (self.checksums.get((number, None)) if is_earlier else None)


class Journal:
    """The open journal of one rank's store.

    Args:
        folder: folder of the rank.
        identity: first line: format (FORMAT), repository, commit, placement, rank.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self._path = folder / JOURNAL_NAME
        self._identity = identity
        self._handle = -1

    def read(self) -> BuildState | None:
        """Return the state of an earlier build; None if that was of another version, commit or placement.

        Raises:
            WeightsError: the journal is of a store of another source.
        """
        lines = read_lines(self._path)
        if not lines:
            return BuildState()
        source, own_source = str(lines[0].get("repository")), self._identity["repository"]
        if not is_same_source(source, own_source):
            raise WeightsError(
                f"`{self._path.parent}` contains a store of `{source}`, not of `{own_source}`",
                hint="remove the folder, or set KIMI_MLX_STORES to another one",
            )
        is_readable = lines[0].get("format") in READABLE_FORMATS
        if not is_readable or lines[0] | {"format": FORMAT} != {**self._identity, "repository": source}:
            return None
        sources = {line["source"] for line in lines if "source" in line}
        finished = [line for line in lines if "file" in line]
        return BuildState(sources, {(line["file"], line.get("name")): line["sha256"] for line in finished})

    def rewrite(self, sources: Iterable[int], files: Iterable[tuple[int, StoredFile]]) -> None:
        """Replace the journal atomically, and leave it open for new lines.

        Args:
            sources: numbers of the source files whose slices have all been written.
            files: number and record of each finished file.
        """
        self.close()
        part = self._path.with_name(self._path.name + ".part")
        try:
            self._handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._append(self._identity)
            for source in sources:
                self._append({"source": source})
            for number, file in files:
                self._append(_file_line(number, file))
            os.fsync(self._handle)
            rename_durably(part, self._path)
        except OSError as error:
            raise write_error(self._path, error) from error

    def record_source(self, source: int) -> None:
        """Record that a source file is written completely."""
        self._append({"source": source})
        os.fsync(self._handle)

    def record_file(self, number: int, file: StoredFile) -> None:
        """Record a finished file of the store."""
        self._append(_file_line(number, file))
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file."""
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1

    def _append(self, line: Mapping[str, Any]) -> None:
        os.write(self._handle, json.dumps(line).encode() + b"\n")


def newest_commit(stores: Path, source: str, ranks: int, strategy: str) -> str | None:
    """Return the commit of the newest store of a source, complete or not; None if there is no store.

    Args:
        stores: root folder of all stores.
        source: repository on the hub, or path of a folder.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement.
    """
    journals = _journals(stores, source, ranks, strategy)
    return str(journals[0][1]["commit"]) if journals else None


def partial_stores(stores: Path, source: str, ranks: int, strategy: str | None) -> list[Path]:
    """Return the folders of a source's placements, complete or not, the most recently written first.

    Args:
        stores: root folder of all stores.
        source: repository on the hub, or path of a folder.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement; None for any.
    """
    return list(dict.fromkeys(path.parent.parent for path, _ in _journals(stores, source, ranks, strategy)))


def _journals(stores: Path, source: str, ranks: int, strategy: str | None) -> list[tuple[Path, dict[str, Any]]]:
    """Return the journals of a source's stores with their first lines, the most recently written first."""
    prefix = f"*-{ranks}-" if strategy is None else folder_prefix(strategy, ranks)
    paths = source_folder(stores, source).glob(f"*/{prefix}*/rank-*/{JOURNAL_NAME}")
    newest_first = sorted(paths, key=lambda path: -path.stat().st_mtime)
    first_lines = [(path, line) for path in newest_first for line in read_lines(path)[:1]]
    return [(path, line) for path, line in first_lines if is_same_source(str(line.get("repository")), source)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal, up to the first damaged one; a kill may have cut off the last line."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            try:
                value = json.loads(line)
            except ValueError:
                break
            if isinstance(value, dict):
                lines.append(cast(dict[str, Any], value))
    return lines


def _file_line(number: int, file: StoredFile) -> dict[str, Any]:
    return {"file": number, "name": file.name, "size_bytes": file.size_bytes, "sha256": file.sha256}
