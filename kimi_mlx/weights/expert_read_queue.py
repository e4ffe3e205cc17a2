"""Queue of reads of routed experts. Reads that a step waits for come before guesses."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_mlx.errors import WeightsError
from kimi_mlx.uncached_file import UncachedFile
from kimi_mlx.weights.expert_pieces import PreparedLayer
from kimi_mlx.weights.expert_source import ExpertSource
from kimi_mlx.weights.read_depth import DepthTrial

DEMAND, GUESS = 0, 1
"""Priorities of reads: those that a step waits for, and those that it may need."""


@dataclass(eq=False)
class ReadTask:
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

    layer: PreparedLayer
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
        """Drop the pieces that have not begun, and fail with an error if there are any."""
        if self.waiting:
            self.num_unfinished -= len(self.waiting)
            self.waiting.clear()
            self.error = self.error or error

    def __str__(self) -> str:
        return self.layer.label(self.expert)


class ReadQueue:
    """Queue of the pieces to read. Threads refer to this and not to the ExpertReader, which can so be freed.

    Args:
        files: open files.
        depth: maximum number of pieces that are read at the same time.
    """

    def __init__(self, files: Mapping[Path, UncachedFile], depth: int):
        self.files, self.depth = files, depth
        self.bytes_read = 0
        self._trial: DepthTrial | None = None
        lock = threading.Lock()
        self._has_work, self._has_result = threading.Condition(lock), threading.Condition(lock)
        self._lock = lock
        self._heap: list[tuple[int, int, int, ReadTask]] = []
        self._numbers = itertools.count()
        self._num_running = 0
        self._close_error: WeightsError | None = None
        self._timeout_error: WeightsError | None = None
        """Error of all reads after one that did not end in time, until all pieces that had begun have ended."""

    def add(self, task: ReadTask, priority: int) -> None:
        """Append a read."""
        with self._lock:
            if (error := self._close_error or self._timeout_error) is not None:
                task.drop_waiting(error)
            self._push(task, priority)

    def promote(self, task: ReadTask) -> None:
        """Give the pieces of a read that have not begun the highest priority, by appending them again."""
        with self._lock:
            self._push(task, DEMAND)

    def cancel(self, task: ReadTask) -> bool:
        """Cancel a read that has not begun; return whether it is cancelled."""
        with self._lock:
            if not task.is_done and not task.begun_s:
                task.is_cancelled = True
                task.drop_waiting(WeightsError(f"the read of {task} was cancelled"))
                self._has_result.notify_all()
            return task.is_cancelled

    def wait(self, task: ReadTask, timeout_s: float) -> None:
        """Wait for the end of a read, and raise its error.

        After a time-out all further reads fail until the running ones have ended, because these still write into their
        destinations.
        """
        with self._lock:
            if not self._has_result.wait_for(lambda: task.is_done or self._close_error is not None, timeout_s):
                path, offset = task.source.runs[0].location(task.expert - task.source.first_expert)
                task.error = WeightsError(
                    f"`{path}` did not answer within {timeout_s:g} s when {task} was read at byte {offset}",
                    hint="check the disk, or the network of a shared folder; experts are read again when it answers",
                )
                self._timeout_error = task.error if self._num_running else None
                self._drop_all(task.error)
            if not task.is_done and self._close_error is not None:  # the task keeps its destination
                raise self._close_error
            if task.error is not None:
                raise task.error

    def stop(self) -> None:
        """Drop all pieces that have not begun, and end the threads after their current pieces."""
        with self._lock:
            self._close_error = WeightsError("the reader of experts is closed")
            self._drop_all(self._close_error)
            self._has_work.notify_all()

    def begin_trial(self) -> None:
        """Begin to try depths."""
        with self._lock:
            self._trial = DepthTrial()
            self.depth = self._trial.depth

    def end_trial(self) -> None:
        """Keep the best depth."""
        with self._lock:
            if self._trial is not None:
                self.depth, self._trial = self._trial.best, None
                self._has_work.notify_all()

    def next(self) -> tuple[ReadTask, int] | None:
        """Wait for the next piece, and mark it as begun; None at the end."""
        with self._lock:
            while True:
                while not self._heap or self._num_running >= self.depth:
                    if not self._heap and self._close_error is not None:
                        return None
                    self._has_work.wait()
                *_, number, task = heapq.heappop(self._heap)
                if number in task.waiting:  # else it was cancelled, or promoted and has begun
                    task.waiting.discard(number)
                    task.begun_s = task.begun_s or time.perf_counter()
                    self._num_running += 1
                    return task, number

    def end(self, task: ReadTask, num_bytes: int, error: WeightsError | None) -> None:
        """Record the end of a piece. After an error, drop the pieces of the read that have not begun."""
        with self._lock:
            self.bytes_read += num_bytes
            task.num_unfinished -= 1
            self._num_running -= 1  # this thread takes the next piece
            if not self._num_running:
                self._timeout_error = None
            self._try_depth(num_bytes)
            if error is not None:
                task.error = task.error or error
                task.drop_waiting(error)
            if task.is_done:
                task.ended_s = time.perf_counter()
                self._has_result.notify_all()

    def _try_depth(self, num_bytes: int) -> None:
        """Count a piece for the trial, if one is under way, and use the depth that it tries next."""
        if self._trial is None:
            return
        if not self._heap:  # the disk was not kept busy
            self._trial.restart_window()
        self._trial.add(num_bytes)
        if self._trial.depth != self.depth:
            self.depth = self._trial.depth
            self._has_work.notify_all()

    def _drop_all(self, error: WeightsError) -> None:
        """Drop all pieces that have not begun."""
        for *_, task in self._heap:
            task.drop_waiting(error)
        self._heap.clear()
        self._has_result.notify_all()

    def _push(self, task: ReadTask, priority: int) -> None:
        order = next(self._numbers)
        for number in sorted(task.waiting):
            heapq.heappush(self._heap, (priority, order, number, task))
        self._has_work.notify(len(task.waiting))
