"""The thread that writes a prompt cache to the disk, so that decoding never waits for it."""

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
"""Left free on the disk for others."""


@dataclass(frozen=True)
class Pending:
    """A block that is to be written.

    Args:
        block: its name.
        tokens: of it.
        rows: (layers, tokens, width), on their way to be computed.
        is_finite: whether all of them are numbers, as well.
    """

    block: Block
    tokens: Sequence[int]
    rows: mx.array
    is_finite: mx.array


class BlockWriter:
    """Writes, removes and touches files in the order in which it is told.

    Args:
        folder: of the files.
        max_pending: blocks that may wait; further ones are dropped.
        warn: told once of what goes wrong, from the thread.
    """

    def __init__(self, folder: Path, max_pending: int, warn: Callable[[str], None]):
        self._folder, self._max_pending, self._warn = folder, max_pending, warn
        self._pending: dict[str, Pending] = {}
        self._jobs = queue.SimpleQueue[Callable[[], None]]()
        self.has_failed = False
        """Whether nothing is written any more."""
        threading.Thread(target=self._work, daemon=True).start()

    def write(self, pending: Pending) -> bool:
        """Take a block to be written; False if it is dropped."""
        if self.has_failed:
            return False
        if len(self._pending) >= self._max_pending:
            self._fail(f"the disk of `{self._folder}` is too slow: {self._max_pending} blocks wait to be written")
            return False
        self._pending[pending.block.name] = pending
        self._jobs.put(lambda: self._write(pending))
        return True

    def waiting(self, name: str) -> Pending | None:
        """A block that is not written yet."""
        return self._pending.get(name)

    def remove(self, block: Block) -> None:
        """Delete a file."""
        self._jobs.put(lambda: (self._folder / block.file_name).unlink(missing_ok=True))

    def touch(self, block: Block) -> None:
        """Note that a block, and so all those before it, were wanted now."""
        self._jobs.put(lambda: os.utime(self._folder / block.file_name))

    def flush(self, limit_s: float) -> bool:
        """Wait until all is done that was asked for; False if it takes too long."""
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(limit_s)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            with contextlib.suppress(OSError):  # of removing and touching: what is not there needs neither
                job()
            del job  # and with it the rows

    def _write(self, pending: Pending) -> None:
        try:
            if not self.has_failed and pending.is_finite.item():
                free = shutil.disk_usage(self._folder).free - pending.rows.nbytes
                if free < RESERVE_BYTES:
                    return self._fail(f"less than {format_bytes(RESERVE_BYTES)} are free at `{self._folder}`")
                write_block(self._folder / pending.block.file_name, pending.block, pending.tokens, pending.rows)
        except OSError as error:
            reason = "the disk is full" if is_disk_full(error) else error.strerror or str(error)
            self._fail(f"`{self._folder}` cannot be written: {reason}")
        except RuntimeError as error:  # MLX's
            self._fail(str(error))
        finally:
            if self._pending.get(pending.block.name) is pending:  # else it has been asked for anew
                del self._pending[pending.block.name]

    def _fail(self, reason: str) -> None:
        if not self.has_failed:
            self.has_failed = True
            self._warn(f"the prompt cache is no longer written to the disk: {reason}")
