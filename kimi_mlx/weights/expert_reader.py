"""Read routed experts from disk into given arrays, in a pool of threads, bypassing the page cache.

A read never returns wrong or partial data: a file that ends early, the record of another expert and an error of the
disk are WeightsErrors.
"""

from __future__ import annotations

import resource
import threading
import time
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.uncached_file import IO_ALIGNMENT, UncachedFile
from kimi_mlx.weights.expert_pieces import PreparedLayer, Scratch
from kimi_mlx.weights.expert_plan import ExpertArray
from kimi_mlx.weights.expert_read_queue import DEMAND, GUESS, ReadQueue, ReadTask
from kimi_mlx.weights.expert_source import ExpertSource
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.read_depth import DEFAULT_DEPTH, DEPTHS

MAX_DEPTH = max(DEPTHS)
"""Number of threads, and so the maximum number of pieces that are read at the same time."""

PIECE_BYTES = 4 << 20
"""Maximum size of the pieces of an expert."""

READ_LIMIT_S = 45.0
"""Maximum wait for a read; then the disk counts as failed. Less than the timeout of a ring's step
(STREAMED_STEP_S in kimi_mlx.cluster.ring.watch), so that the error names the disk."""

CLOSE_LIMIT_S = 5.0
"""Maximum wait for running reads when a reader is closed."""

SPARE_FILES = 128
"""Number of open files left for other parts of the process."""


class Read:
    """A read of one expert. Its destination must not be used before `result` has returned.

    Args:
        layer: number of the layer.
        expert: number of the expert.
        num_bytes: bytes that are read from the disk.
    """

    def __init__(self, queue: ReadQueue, task: ReadTask):
        self._queue, self._task = queue, task
        self.layer, self.expert = task.source.layer, task.expert
        self.num_bytes = task.source.expert_bytes

    @property
    def is_done(self) -> bool:
        """Whether the read has ended, with or without an error."""
        return self._task.is_done

    @property
    def seconds(self) -> float:
        """Time from the beginning of the first piece until the end of the last one; 0 before that."""
        return max(0.0, self._task.ended_s - self._task.begun_s)

    def cancel(self) -> bool:
        """Cancel the read if it has not begun; its destination then stays as it is.

        Returns:
            Whether it is cancelled. If not, it continues to its end.
        """
        return self._queue.cancel(self._task)

    def promote(self) -> None:
        """Give a guess the priority of a read that a step waits for."""
        self._queue.promote(self._task)

    def result(self, timeout_s: float = READ_LIMIT_S) -> None:
        """Wait until the expert is in its destination.

        Raises:
            WeightsError: the disk failed or did not answer in time, the file is truncated or has another expert, or the
                read was cancelled or its reader closed.
        """
        self._queue.wait(self._task, timeout_s)


class ExpertReader:
    """Reader of routed experts. It opens all files at the start. Its methods are safe from any thread.

    Args:
        sources: the experts of each layer.
        float_dtype: compute type, to which stored floats are converted, as safetensors names it: `F32`, `F16`, `BF16`.
        depth: number of pieces that are read at the same time, at most MAX_DEPTH; `choosing_depth` may change it.
        piece_bytes: maximum size of the pieces of an expert.
        uses_page_cache: whether to read through the page cache; for loading, which reads each expert once.

    Raises:
        WeightsError: a file is missing or cannot be opened.
    """

    def __init__(
        self,
        sources: Iterable[ExpertSource],
        float_dtype: str,
        depth: int = DEFAULT_DEPTH,
        piece_bytes: int = PIECE_BYTES,
        uses_page_cache: bool = False,
    ):
        self.sources: Mapping[int, ExpertSource] = {source.layer: source for source in sources}
        files = _open_files(list(self.sources.values()), uses_page_cache)
        self._layers = {
            layer: PreparedLayer(source, float_dtype, max(IO_ALIGNMENT, piece_bytes), files)
            for layer, source in self.sources.items()
        }
        self._queue = ReadQueue(files, depth)
        threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"expert-reader-{number}", daemon=True)
            for number in range(MAX_DEPTH if self.sources else 0)
        ]
        for thread in threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _close, self._queue, threads)

    def arrays(self, layer: int) -> tuple[ExpertArray, ...]:
        """Return the arrays of an expert in memory, with floats in the compute type."""
        return self._layers[layer].arrays

    @property
    def bytes_read(self) -> int:
        """Bytes read so far, with padding."""
        return self._queue.bytes_read

    @property
    def is_direct(self) -> bool:
        """Whether all files are open with O_DIRECT (Linux)."""
        return all(file.is_direct for file in self._queue.files.values())

    @property
    def depth(self) -> int:
        """Maximum number of pieces that are read at the same time."""
        return self._queue.depth

    @contextmanager
    def choosing_depth(self) -> Generator[None]:
        """Try several depths during the block, which must keep the disk busy, and keep the best one."""
        self._queue.begin_trial()
        try:
            yield
        finally:
            self._queue.end_trial()

    def read(self, layer: int, expert: int, destination: Sequence[np.ndarray], is_guess: bool = False) -> Read:
        """Start to read an expert.

        Args:
            layer: number of the layer.
            expert: number of the expert in the model.
            destination: an array for each of `arrays(layer)`, of its shape and type (bfloat16 as uint16), contiguous.
                Where their addresses are multiples of IO_ALIGNMENT, the disk writes into them directly.
            is_guess: whether reads that a step waits for come first.
        """
        state = self._layers[layer]
        assert 0 <= expert - state.source.first_expert < state.source.num_experts
        for array, view in zip(state.arrays, destination, strict=True):
            assert view.shape == array.shape
            assert view.itemsize == DTYPE_BYTES[array.dtype]
            assert view.flags.c_contiguous
            assert view.flags.writeable
        task = ReadTask(state, expert, destination, set(range(len(state.pieces))), len(state.pieces))
        self._queue.add(task, GUESS if is_guess else DEMAND)
        return Read(self._queue, task)

    def read_ahead(self, layer: int) -> None:
        """Let the system read all records of a layer, which are contiguous, into its page cache."""
        source = self.sources[layer]
        for run in source.runs:
            path, offset = run.location(0)
            self._queue.files[path].read_ahead(offset, source.num_experts * run.num_bytes)

    def close(self) -> None:
        """Cancel reads that have not begun, wait for the others and close the files."""
        self._finalizer()


def _work(queue: ReadQueue) -> None:
    """Read pieces until the queue is stopped."""
    scratch = Scratch()
    while (item := queue.next()) is not None:
        task, number = item
        num_bytes, error = 0, None
        try:
            num_bytes = task.layer.read_piece(number, task.expert, task.destination, scratch)
        except WeightsError as failure:
            error = failure
        except Exception as failure:  # a bug must not leave a step waiting
            error = WeightsError(f"reading {task} failed: {failure!r}")
            error.__cause__ = failure
        queue.end(task, num_bytes, error)
        del item, task, error  # the destination of the last read must not stay in memory


def _open_files(sources: Sequence[ExpertSource], uses_page_cache: bool) -> dict[Path, UncachedFile]:
    """Open all files of the sources."""
    hints = {file: source.hint for source in sources for file in source.files}
    _allow_open_files(2 * len(hints) + SPARE_FILES)
    files: dict[Path, UncachedFile] = {}
    for path in sorted(hints):
        try:
            files[path] = UncachedFile(path, uses_page_cache)
        except OSError as error:
            for file in files.values():
                file.close()
            raise WeightsError(f"`{path}` cannot be opened: {error.strerror}", hint=hints[path]) from error
    return files


def _allow_open_files(count: int) -> None:
    """Raise the limit of open files of this process: macOS allows 256 by default, a checkpoint has up to 200 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        limit = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


def _close(queue: ReadQueue, threads: Sequence[threading.Thread]) -> None:
    queue.stop()
    deadline = time.monotonic() + CLOSE_LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if not any(thread.is_alive() for thread in threads):  # else its file must stay open
        for file in queue.files.values():
            file.close()
