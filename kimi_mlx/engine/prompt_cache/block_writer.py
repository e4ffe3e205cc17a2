"""The thread that writes the prompt cache to disk, so that decoding never waits for it."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from kimi_mlx.engine.prompt_cache.block_file import Block, write_block
from kimi_mlx.files import is_disk_full
from kimi_mlx.units import format_bytes

RESERVE_BYTES = 2 * 10**9
"""Space on the disk that stays free for other uses."""


@dataclass(frozen=True)
class PendingBlock:
    """A block to be written.

    Args:
        block: the block.
        tokens: tokens of the block.
        rows: (layers, tokens, width), evaluation started.
        is_finite: whether all values are finite, evaluation started.
    """

    block: Block
    tokens: Sequence[int]
    rows: mx.array
    is_finite: mx.array


class BlockWriter:
    """Writes, removes and touches files in the order of the calls.

    Args:
        folder: folder of the files.
        max_pending: maximum number of waiting blocks; further ones are dropped.
        warn: callback for the first error, called from the thread.
    """

    def __init__(self, folder: Path, max_pending: int, warn: Callable[[str], None]):
        self._folder, self._max_pending, self._warn = folder, max_pending, warn
        self._pending: dict[str, PendingBlock] = {}
        self._jobs = queue.SimpleQueue[Callable[[], None]]()
        self.has_failed = False
        """Whether writing has stopped after an error."""
        threading.Thread(target=self._run_jobs, daemon=True).start()

    def write(self, pending: PendingBlock) -> bool:
        """Queue a block; return False if it is dropped."""
        if self.has_failed:
            return False
        if len(self._pending) >= self._max_pending:
            self._fail(f"the disk of `{self._folder}` is too slow: {self._max_pending} blocks wait to be written")
            return False
        self._pending[pending.block.name] = pending
        self._jobs.put(lambda: self._write(pending))
        return True

    def waiting(self, name: str) -> PendingBlock | None:
        """Return a block that is not written yet, if any."""
        return self._pending.get(name)

    def remove(self, block: Block) -> None:
        """Delete a file."""
        self._jobs.put(lambda: (self._folder / block.file_name).unlink(missing_ok=True))

    def touch(self, block: Block) -> None:
        """Record that a block, and so all blocks before it, was just used."""
        self._jobs.put(lambda: os.utime(self._folder / block.file_name))

    def flush(self, limit_s: float) -> bool:
        """Wait for all queued jobs; return False on timeout."""
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(limit_s)

    def _run_jobs(self) -> None:
        while True:
            job = self._jobs.get()
            with contextlib.suppress(OSError):  # from removing or touching a missing file
                job()
            del job  # frees the rows

    def _write(self, pending: PendingBlock) -> None:
        try:
            if not self.has_failed and pending.is_finite.item():
                free = shutil.disk_usage(self._folder).free - pending.rows.nbytes
                if free < RESERVE_BYTES:
                    return self._fail(f"less than {format_bytes(RESERVE_BYTES)} is free at `{self._folder}`")
                write_block(self._folder / pending.block.file_name, pending.block, pending.tokens, pending.rows)
        except OSError as error:
            reason = "the disk is full" if is_disk_full(error) else error.strerror or str(error)
            self._fail(f"`{self._folder}` cannot be written: {reason}")
        except RuntimeError as error:  # MLX's
            self._fail(str(error))
        finally:
            if self._pending.get(pending.block.name) is pending:  # otherwise it was queued again
                del self._pending[pending.block.name]

    def _fail(self, reason: str) -> None:
        if not self.has_failed:
            self.has_failed = True
            self._warn(f"the prompt cache is no longer written to disk: {reason}")
