"""Journal of a rank's store: one JSON line for each step of the build, flushed to disk, so that a build can resume.

The first line identifies the store; `{"source": N}` records a source file that is written completely, `{"file": N,
"size_bytes": ..., "sha256": ...}` a finished file of the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from kimi_mlx.files import rename_durably
from kimi_mlx.store.disk import write_error
from kimi_mlx.store.manifest import StoredFile
from kimi_mlx.store.stores import folder_prefix, repository_stores

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """The open journal of one rank's store."""

    def __init__(self, folder: Path):
        self._path = folder / JOURNAL_NAME
        self._handle = -1

    def read(self) -> list[dict[str, Any]]:
        """Return the lines of an earlier build, as far as they are intact."""
        return read_lines(self._path)

    def rewrite(
        self, identity: dict[str, Any], sources: Iterable[int], files: Iterable[tuple[int, StoredFile]]
    ) -> None:
        """Replace the journal atomically, and leave it open for new lines.

        Args:
            identity: first line.
            sources: numbers of the source files that are written completely.
            files: number and record of each finished file.
        """
        self.close()
        part = self._path.with_name(self._path.name + ".part")
        try:
            self._handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            self._append(identity)
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

    def _append(self, line: dict[str, Any]) -> None:
        os.write(self._handle, json.dumps(line).encode() + b"\n")


def partial_store_commit(stores: Path, repository: str, ranks: int, strategy: str) -> str | None:
    """Return the commit of the newest store of a repository, complete or not; None if there is no store.

    Args:
        stores: root folder of all stores.
        repository: name on the hub.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement.
    """
    for folder in partial_stores(stores, repository, ranks, strategy):
        for journal in folder.glob(f"rank-*/{JOURNAL_NAME}"):
            lines = read_lines(journal)
            if lines and lines[0].get("repository") == repository:
                return str(lines[0]["commit"])
    return None


def partial_stores(stores: Path, repository: str, ranks: int, strategy: str | None) -> list[Path]:
    """Return the folders of a model's placements, complete or not, the most recently written first.

    Args:
        stores: root folder of all stores.
        repository: name on the hub, or the path of a folder.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement; None for any.
    """
    prefix = f"*-{ranks}-" if strategy is None else folder_prefix(strategy, ranks)
    journals = repository_stores(stores, repository).glob(f"*/{prefix}*/rank-*/{JOURNAL_NAME}")
    newest = sorted(journals, key=lambda path: -path.stat().st_mtime)
    return list(dict.fromkeys(path.parent.parent for path in newest))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a journal; the last one may have been cut off."""
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
    return {"file": number, "size_bytes": file.size_bytes, "sha256": file.sha256}
