"""Read routed experts from disk into given arrays, in a pool of threads, past the page cache.

An expert is divided into pieces that several threads read at once, so that a single expert also keeps the disk busy.
Reads that a step waits for come before guesses. What a read returns is complete: a file that ends early, a record of
another expert and an error of the disk are WeightsErrors.
"""

from __future__ import annotations

import heapq
import itertools
import resource
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.uncached_file import IO_ALIGNMENT, UncachedFile, aligned_buffer, is_aligned
from kimi_mlx.weights.expert_plan import ExpertArray, round_up
from kimi_mlx.weights.expert_source import ExpertSource, Run, Span, Target
from kimi_mlx.weights.expert_tag import TAG_BYTES, describe_tag
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.matrix_format import FLOATS
from kimi_mlx.weights.packed_int4 import affine_biases
from kimi_mlx.weights.reader import NUMPY_TYPES, cast_floats

NUM_THREADS = 8
"""Number of pieces that are read at the same time."""

PIECE_BYTES = 4 << 20
"""Maximum size of the pieces of an expert."""

READ_LIMIT_S = 60.0
"""Time after which a disk that does not answer counts as failed."""

CLOSE_LIMIT_S = 5.0
"""Maximum wait for running reads at the end."""

DEMAND, GUESS = 0, 1
"""Priorities of reads: those that a step waits for, and those that it may need."""

SPARE_FILES = 128
"""Number of file handles that other parts of a process may need."""


class Read:
    """A read of one expert. Its destination must not be used before `result` has returned.

    Args:
        layer: number of the layer.
        expert: number of the expert.
        num_bytes: bytes that are read from the disk.
    """

    def __init__(self, queue: _ReadQueue, task: _Task):
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
    """Reader of routed experts, which opens all files at once. Its methods may be called by several threads.

    Args:
        sources: the experts of each layer.
        float_dtype: compute type, to which stored floats are converted, as safetensors names it: `F32`, `F16`, `BF16`.
        num_threads: number of pieces that are read at the same time.
        piece_bytes: maximum size of the pieces of an expert.
        uses_page_cache: whether to read through the page cache; for loading, which reads each expert once.

    Raises:
        WeightsError: a file is missing or cannot be opened.
    """

    def __init__(
        self,
        sources: Iterable[ExpertSource],
        float_dtype: str,
        num_threads: int = NUM_THREADS,
        piece_bytes: int = PIECE_BYTES,
        uses_page_cache: bool = False,
    ):
        self.sources: Mapping[int, ExpertSource] = {source.layer: source for source in sources}
        files = _open_files(list(self.sources.values()), uses_page_cache)
        self._layers = {
            layer: _Layer(source, float_dtype, max(IO_ALIGNMENT, piece_bytes), files)
            for layer, source in self.sources.items()
        }
        self._queue = _ReadQueue(files)
        threads = [
            threading.Thread(target=_work, args=(self._queue,), name=f"expert-reader-{number}", daemon=True)
            for number in range(num_threads if self.sources else 0)
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
        task = _Task(state, expert, destination, set(range(len(state.pieces))), len(state.pieces))
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


@dataclass(frozen=True)
class _Piece:
    """A part of a run that one thread reads at once.

    Args:
        run: the run.
        start: first byte in it; a multiple of IO_ALIGNMENT.
        spans: the bytes.
        has_tag: whether the piece ends with the tag of the record.
    """

    run: Run
    start: int
    spans: tuple[Span, ...]
    has_tag: bool = False

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of the piece."""
        return sum(span.num_bytes for span in self.spans)


@dataclass(eq=False)
class _Task:
    """State of a read. All fields that change are guarded by the lock of the queue.

    Args:
        layer: the layer.
        expert: number of the expert.
        destination: arrays to fill.
        waiting: numbers of the pieces that have not begun.
        num_unfinished: number of pieces that have not ended.
        is_cancelled: whether the read was cancelled before it began.
        error: first error of a piece.
        begun_s: time when the first piece began.
        ended_s: time when the last piece ended.
    """

    layer: _Layer
    expert: int
    destination: Sequence[np.ndarray]
    waiting: set[int]
    num_unfinished: int
    is_cancelled: bool = False
    error: WeightsError | None = None
    begun_s: float = 0.0
    ended_s: float = 0.0

    @property
    def source(self) -> ExpertSource:
        """Source of the expert."""
        return self.layer.source

    @property
    def is_done(self) -> bool:
        """Whether no piece is unfinished."""
        return self.num_unfinished == 0

    def drop_waiting(self, error: WeightsError) -> None:
        """Give up the pieces that have not begun."""
        if self.waiting:
            self.num_unfinished -= len(self.waiting)
            self.waiting.clear()
            self.error = self.error or error

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.source.layer}"


class _Layer:
    """A layer's source, prepared for reading.

    Args:
        source: the source.
        float_dtype: compute type.
        piece_bytes: maximum size of a piece.
        files: open files.
    """

    def __init__(self, source: ExpertSource, float_dtype: str, piece_bytes: int, files: Mapping[Path, UncachedFile]):
        self.source, self._files = source, files
        self.arrays = tuple(
            replace(array, dtype=float_dtype) if array.dtype in FLOATS else array for array in source.arrays
        )
        self.pieces = [piece for run in source.runs for piece in _divide(run, piece_bytes, source.tag is not None)]

    def read_piece(self, task: _Task, number: int, scratch: _Scratch) -> int:
        """Read a piece of an expert into its destination; return the number of bytes.

        Raises:
            WeightsError: the disk fails, the file ends early, or the record has the tag of another expert.
        """
        piece = self.pieces[number]
        path, start = piece.run.location(task.expert - self.source.first_expert)
        offset = start + piece.start
        file = self._files[path]
        is_direct = file.is_direct and not (offset % IO_ALIGNMENT or piece.num_bytes % IO_ALIGNMENT)
        buffers, decoded, tag = self._buffers(piece, task.destination, is_direct, scratch)
        label = f"{task}: bytes {offset} to {offset + piece.num_bytes} of `{path}`"
        try:
            num_bytes = file.read(buffers, offset)
        except OSError as error:
            hint = f"check the disk; {self.source.hint}"
            raise WeightsError(f"{label} cannot be read: {error.strerror}", hint=hint) from error
        if num_bytes < piece.num_bytes:
            raise WeightsError(
                f"{label} are not there: the file has {file.current_bytes()} bytes", hint=self.source.hint
            )
        if tag is not None:
            self._check_tag(task, f"`{path}` has", offset + piece.num_bytes - TAG_BYTES, tag.tobytes())
        for data, target in decoded:
            self._decode(data, target, task.destination[target.array])
        return num_bytes

    def _buffers(
        self, piece: _Piece, destination: Sequence[np.ndarray], is_direct: bool, scratch: _Scratch
    ) -> tuple[list[np.ndarray], list[tuple[np.ndarray, Target]], np.ndarray | None]:
        """Return the buffers to fill, bytes in them that must be converted then, and those of the tag.

        A direct read needs buffers with aligned addresses and lengths. An array that does not allow it is read into
        `scratch` together with its padding.
        """
        scratch.reserve(piece.num_bytes + IO_ALIGNMENT * len(piece.spans))
        buffers: list[np.ndarray] = []
        decoded: list[tuple[np.ndarray, Target]] = []
        data = scratch.data[:0]
        first = stop = position = 0  # the next buffer in `scratch`, and the position in the piece
        for span in piece.spans:
            view = self._view(span, destination)
            if is_direct and (position % IO_ALIGNMENT or view is None or not is_aligned(view)):
                view = None
            position += span.num_bytes
            if view is None:
                data = scratch.data[stop : stop + span.num_bytes]
                stop += span.num_bytes
                decoded += [(data, target) for target in span.targets]
                continue
            if stop > first:
                buffers.append(scratch.data[first:stop])
                first = stop = round_up(stop, IO_ALIGNMENT)
            buffers.append(view)
        if stop > first:
            buffers.append(scratch.data[first:stop])
        return buffers, decoded, data[-TAG_BYTES:] if piece.has_tag else None

    def _view(self, span: Span, destination: Sequence[np.ndarray]) -> np.ndarray | None:
        """Return the bytes of the destination that a span fills without conversion; None if it needs one."""
        if len(span.targets) != 1 or span.targets[0].decode != "copy":
            return None
        (target,) = span.targets
        if self.arrays[target.array].dtype != self.source.arrays[target.array].dtype:
            return None
        return destination[target.array].reshape(-1).view(np.uint8)[target.start : target.start + span.num_bytes]

    def _decode(self, data: np.ndarray, target: Target, destination: np.ndarray) -> None:
        """Convert stored bytes, and write them into an array."""
        stored, array = self.source.arrays[target.array], self.arrays[target.array]
        values = data.view(NUMPY_TYPES[stored.dtype])
        if target.decode == "biases":
            assert array.quantization is not None
            values = affine_biases(values, array.quantization.bits)
        if stored.dtype != array.dtype:
            values = cast_floats(values, stored.dtype, array.dtype)
        first = target.start // DTYPE_BYTES[stored.dtype]
        flat = destination.reshape(-1)
        flat[first : first + values.size] = values.view(flat.dtype)

    def _check_tag(self, task: _Task, label: str, offset: int, found: bytes) -> None:
        assert self.source.tag is not None
        expected = self.source.tag.to_bytes(task.expert)
        if found != expected:
            raise WeightsError(
                f"{label} {describe_tag(found)} at byte {offset}, not {describe_tag(expected)}", hint=self.source.hint
            )


class _ReadQueue:
    """Reads that wait for a thread, and the state of all reads. Threads hold this, and not the ExpertReader.

    Args:
        files: open files.
    """

    def __init__(self, files: Mapping[Path, UncachedFile]):
        self.files = files
        self.bytes_read = 0
        lock = threading.Lock()
        self._has_work, self._has_result = threading.Condition(lock), threading.Condition(lock)
        self._lock = lock
        self._heap: list[tuple[int, int, int, _Task]] = []
        self._numbers = itertools.count()
        self._error: WeightsError | None = None

    def add(self, task: _Task, priority: int) -> None:
        """Append a read."""
        with self._lock:
            if self._error is not None:
                task.drop_waiting(self._error)
            self._push(task, priority)

    def promote(self, task: _Task) -> None:
        """Append the pieces of a read that have not begun once more, with the highest priority."""
        with self._lock:
            self._push(task, DEMAND)

    def cancel(self, task: _Task) -> bool:
        """Cancel a read that has not begun; return whether it is cancelled."""
        with self._lock:
            if not task.is_done and not task.begun_s:
                task.is_cancelled = True
                task.drop_waiting(WeightsError(f"the read of {task} was cancelled"))
                self._has_result.notify_all()
            return task.is_cancelled

    def wait(self, task: _Task, timeout_s: float) -> None:
        """Wait for the end of a read, and raise its error.

        After a time-out no other read is accepted: a thread may still write into the destination at any time.
        """
        with self._lock:
            if not self._has_result.wait_for(lambda: task.is_done, timeout_s):
                path, _ = task.source.runs[0].location(task.expert - task.source.first_expert)
                self._error = task.error = WeightsError(
                    f"`{path}` did not answer within {timeout_s:g} s when {task} was read",
                    hint="check the disk, or the network of a shared folder",
                )
            if task.error is not None:
                raise task.error

    def stop(self) -> None:
        """End the threads after what they are reading."""
        with self._lock:
            self._error = self._error or WeightsError("the reader of experts is closed")
            for *_, task in self._heap:
                task.drop_waiting(self._error)
            self._heap.clear()
            self._has_work.notify_all()
            self._has_result.notify_all()

    def next(self) -> tuple[_Task, int] | None:
        """Wait for the next piece, and mark it as begun; None at the end."""
        with self._lock:
            while True:
                while not self._heap:
                    if self._error is not None:
                        return None
                    self._has_work.wait()
                *_, number, task = heapq.heappop(self._heap)
                if number in task.waiting:  # else it was cancelled, or promoted and has begun
                    task.waiting.discard(number)
                    task.begun_s = task.begun_s or time.perf_counter()
                    return task, number

    def end(self, task: _Task, num_bytes: int, error: WeightsError | None) -> None:
        """Record the end of a piece. After an error, pieces that have not begun are given up."""
        with self._lock:
            self.bytes_read += num_bytes
            task.num_unfinished -= 1
            if error is not None:
                task.error = task.error or error
                task.drop_waiting(error)
            if task.is_done:
                task.ended_s = time.perf_counter()
                self._has_result.notify_all()

    def _push(self, task: _Task, priority: int) -> None:
        order = next(self._numbers)
        for number in sorted(task.waiting):
            heapq.heappush(self._heap, (priority, order, number, task))
        self._has_work.notify(len(task.waiting))


class _Scratch:
    """Aligned memory of a thread, for bytes that cannot be read into their destination."""

    def __init__(self) -> None:
        self.data = aligned_buffer(0)

    def reserve(self, num_bytes: int) -> None:
        """Make room for this number of bytes."""
        if self.data.nbytes < num_bytes:
            self.data = aligned_buffer(num_bytes)


def _work(queue: _ReadQueue) -> None:
    """Read pieces until the queue is stopped."""
    scratch = _Scratch()
    while (item := queue.next()) is not None:
        task, number = item
        num_bytes, error = 0, None
        try:
            num_bytes = task.layer.read_piece(task, number, scratch)
        except WeightsError as failure:
            error = failure
        except Exception as failure:  # a bug must not leave a step waiting
            error = WeightsError(f"reading {task} failed: {failure!r}")
            error.__cause__ = failure
        queue.end(task, num_bytes, error)
        del item, task, error  # the destination of the last read must not stay in memory


def _divide(run: Run, piece_bytes: int, has_tag: bool) -> list[_Piece]:
    """Divide a run into pieces of about equal size, which begin at multiples of IO_ALIGNMENT."""
    count = -(-run.num_bytes // piece_bytes)
    size = round_up(-(-run.num_bytes // count), IO_ALIGNMENT)
    pieces: list[_Piece] = []
    spans: list[Span] = []
    start = position = 0
    for span in run.spans:
        done = 0
        while done < span.num_bytes:
            length = min(span.num_bytes - done, start + size - position)
            targets = tuple(replace(target, start=target.start + done) for target in span.targets)
            spans.append(Span(length, targets))
            done += length
            position += length
            if position == start + size:
                pieces.append(_Piece(run, start, tuple(spans)))
                spans, start = [], position
    if spans:
        pieces.append(_Piece(run, start, tuple(spans)))
    if has_tag:
        pieces[-1] = replace(pieces[-1], has_tag=True)
    return pieces


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


def _close(queue: _ReadQueue, threads: Sequence[threading.Thread]) -> None:
    queue.stop()
    deadline = time.monotonic() + CLOSE_LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if not any(thread.is_alive() for thread in threads):  # else its file must stay open
        for file in queue.files.values():
            file.close()
