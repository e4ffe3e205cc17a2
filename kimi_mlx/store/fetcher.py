"""Fetch the source files of one process in threads, ahead of their use."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from pathlib import Path

from kimi_mlx.hub.retries import Cancelled
from kimi_mlx.store.build_job import BuildJob

FILES_AHEAD = 2
"""Maximum number of source files on one process's disk at the same time: in use, ready or downloading."""


class SourceFetcher:
    """Threads that fetch this process's source files, at most FILES_AHEAD at a time.

    Args:
        job: the build.
        files: numbers of the source files that this process fetches, in this order.
    """

    def __init__(self, job: BuildJob, files: Sequence[int]):
        self._job, self._pending = job, iter(files)
        self._lock = threading.Lock()
        self._fetched_bytes = 0
        self._slots = threading.Semaphore(FILES_AHEAD)
        self._num_unread = len(files)
        self._ready: queue.SimpleQueue[tuple[int, Path] | Exception] = queue.SimpleQueue()
        self._is_stopped = threading.Event()

    @property
    def fetched_bytes(self) -> int:
        """Bytes fetched so far."""
        return self._fetched_bytes

    def start(self) -> None:
        """Start the threads."""
        for _ in range(FILES_AHEAD):
            threading.Thread(target=self._run, daemon=True).start()

    def next(self) -> tuple[int, Path] | Exception | None:
        """Return the next file, the error of a thread, or None after the last file.

        Raises:
            queue.Empty: no file is ready yet.
        """
        if not self._num_unread:
            return None
        file = self._ready.get_nowait()
        self._num_unread -= 1
        return file

    def release(self, number: int) -> None:
        """Free the disk space of a file, so that the next one can be fetched."""
        self._job.source.release(self._job.files[number])
        self._slots.release()

    def stop(self) -> None:
        """Cancel the downloads and end the threads."""
        self._is_stopped.set()
        for _ in range(FILES_AHEAD):
            self._slots.release()

    def _run(self) -> None:
        try:
            while True:
                self._slots.acquire()
                with self._lock:
                    number = next(self._pending, None)
                if number is None or self._is_stopped.is_set():
                    return
                path = self._job.source.fetch(self._job.files[number], self._count, self._is_stopped)
                self._ready.put((number, path))
        except Cancelled:
            pass
        except Exception as error:  # any error must reach the thread that waits in next()
            self._ready.put(error)

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self._fetched_bytes += num_bytes
