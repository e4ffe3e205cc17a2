"""Open the routed experts of a rank for streaming, with saved statistics of their use."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import read_regular_file, write_atomically
from kimi_mlx.folders import cache_folder
from kimi_mlx.model.expert_use import ExpertUse
from kimi_mlx.weights.dequantize import FLOAT_NAMES
from kimi_mlx.weights.expert_reader import ExpertReader
from kimi_mlx.weights.expert_source import ExpertSource
from kimi_mlx.weights.index import log_note
from kimi_mlx.weights.streamed_experts import ExpertStreaming

LOG = logging.getLogger(__name__)

USE_NAME = "expert_use.npz"
"""Name of the file in a store that has the statistics of the use of its experts."""


def open_streaming(
    sources: Sequence[ExpertSource], dtype: mx.Dtype, num_bytes: int | None, files: ExpertUseFile, command: str
) -> ExpertStreaming | None:
    """Open the experts of a rank for streaming; return None if all of them fit in memory.

    Args:
        sources: routed experts of all layers of the rank.
        dtype: compute dtype.
        num_bytes: memory for experts; None for all.
        files: file of the statistics of their use.
        command: command that builds a store with records, for a note.

    Raises:
        WeightsError: a file cannot be opened.
    """
    if num_bytes is None or not sources:
        return None
    reader = ExpertReader(sources, FLOAT_NAMES[dtype])
    streaming = ExpertStreaming(reader, num_bytes, dtype, files.load, files.save)
    if num_bytes < streaming.all_bytes:
        if (num_parts := max(len(source.runs) for source in sources)) > 1:
            log_note(
                f"each expert is read in {num_parts} parts: `{command}` makes a store with one record for each expert, "
                "which is read faster"
            )
        return streaming
    reader.close()
    return None


class ExpertUseFile:
    """File of the statistics of a rank's experts: in the store, or in the cache folder if the store is read-only.

    Args:
        folder: folder of the rank's store; None if there is no store.
        key: key of the model and the share, for the name in the cache folder.
    """

    def __init__(self, folder: Path | None, key: str):
        cache = cache_folder()
        self._paths: list[Path] = []
        if folder is not None:
            self._paths.append(folder / USE_NAME)
        if cache is not None:
            self._paths.append(cache / "expert-use" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz")

    def load(self, use: ExpertUse) -> None:
        """Load the newest usable file, if there is one."""
        dated: list[tuple[float, Path]] = []
        for path in self._paths:
            with contextlib.suppress(OSError):  # there is none, or the folder is another user's
                dated.append((path.stat().st_mtime, path))
        for _, path in sorted(dated, reverse=True):
            try:
                use.update_from_bytes(read_regular_file(path))
            except (OSError, WeightsError) as error:
                LOG.info(f"`{path}` is not used: {error}")
                continue
            return

    def save(self, use: ExpertUse) -> None:
        """Write the file. A failure is only a note: the statistics are collected again after the next start."""
        reason = "there is no folder for caches"
        for path in self._paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, use.to_bytes())
                return
            except OSError as error:
                reason = f"`{path}` cannot be written: {error.strerror}"
                LOG.info(reason)
        log_note(f"which experts are used most is not kept for the next start, because {reason}")
