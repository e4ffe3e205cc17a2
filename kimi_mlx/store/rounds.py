"""Rounds of communication in which several processes build stores.

In each round, every process announces one message, then all exchange the announced batches. A round is also a barrier:
after a process has announced the end of a source file, the next round shows that all processes have recorded it, so the
file can be deleted.
"""

from __future__ import annotations

import queue
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import KimiMlxError, RingError, WeightsError
from kimi_mlx.parallel.all_ranks import raise_if_any_failed
from kimi_mlx.parallel.group import Group
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.disk import check_space, write_error
from kimi_mlx.store.fetcher import SourceFetcher
from kimi_mlx.store.messages import BATCH, BATCH_BYTES, DONE, END, FAILED, IDLE, BatchWriter, RoundMessage
from kimi_mlx.store.transfer_plan import TransferPlan, plan_transfers
from kimi_mlx.store.transfers import SliceTransfer, slice_transfers, split_into_chunks
from kimi_mlx.store.writer import RankWriter
from kimi_mlx.weights.reader import CheckpointReader

IDLE_S = 0.02
"""Pause after a round without data."""

HEARTBEAT_S = 0.1
"""Maximum time between two rounds: the other processes wait for the next one, and rounds report progress."""


@dataclass(frozen=True)
class BuildProgress:
    """Progress of a build, summed over all processes.

    Args:
        fetched_bytes: bytes fetched of the source files.
        stored_bytes: bytes of the source files whose content is in the stores.
        total_bytes: bytes of all source files that are needed.
    """

    fetched_bytes: int
    stored_bytes: int
    total_bytes: int


class BuildRounds:
    """The rounds of one build in one process.

    Args:
        job: the build.
        group: the processes.
        report: callback for progress, once a round.
    """

    def __init__(self, job: BuildJob, group: Group, report: Callable[[BuildProgress], None]):
        self._job, self._group, self._report = job, group, report
        self._failure: KimiMlxError | None = None
        self._writers: dict[int, RankWriter] = {}
        self._transfers: dict[int, list[SliceTransfer]] = {}
        self._offsets: dict[tuple[int, int], list[int]] = {}
        self._plan = TransferPlan({}, {}, [])
        self._stored_bytes = 0

    def fail(self, error: Exception) -> None:
        """Record an error; the next round raises it in every process."""
        if isinstance(error, KimiMlxError):
            self._failure = error
        elif isinstance(error, OSError):
            self._failure = write_error(self._job.folder, error)
        else:  # a bug in this process must not leave the others waiting
            failure = WeightsError(f"the build failed: {error!r}", hint="run the command again, and report this")
            failure.__cause__ = error
            self._failure = failure

    def run(self, writers: dict[int, RankWriter]) -> None:
        """Run rounds until every store is complete.

        Args:
            writers: the writer of each rank that this process builds.
        """
        self._writers = writers
        self._plan = plan_transfers(self._job, self._group, writers)
        own_files = self._plan.assignments[self._group.rank]
        if self._failure is None:
            self._check_space(own_files)
        fetcher = SourceFetcher(self._job, own_files)
        if self._failure is None:
            fetcher.start()
        try:
            self._run_rounds(fetcher)
        finally:
            fetcher.stop()

    def _check_space(self, own_files: Sequence[int]) -> None:
        try:
            missing = sum(writer.missing_bytes for writer in self._writers.values())
            extra = self._job.source.extra_bytes(self._job.files[number] for number in own_files)
            check_space(self._job.folder, missing + extra)
        except (KimiMlxError, OSError) as error:
            self.fail(error)

    def _run_rounds(self, fetcher: SourceFetcher) -> None:
        messages = self._process_files(fetcher)
        to_release: list[int] = []
        is_done = False
        while not is_done:
            message = self._next_message(messages)
            headers = self._gather(message.header(fetcher.fetched_bytes, self._stored_bytes))
            kinds = headers[:, 0]
            if (kinds == FAILED).any():
                raise_if_any_failed(self._group, self._failure)
            for number in to_release:  # this round was the barrier: every process has recorded the file
                fetcher.release(number)
            to_release = [message.source] if message.kind == END else []
            self._report(BuildProgress(int(headers[:, 4].sum()), int(headers[:, 5].sum()), self._plan.total_bytes))
            try:
                self._exchange_slices(message, headers)
                self._commit_sources(headers)
            except RingError:
                raise
            except Exception as error:
                self.fail(error)
            is_done = bool((kinds == DONE).all())
            if not is_done and not np.isin(kinds, (BATCH, END)).any():
                time.sleep(IDLE_S)

    def _next_message(self, messages: Iterator[RoundMessage]) -> RoundMessage:
        try:
            if self._failure is None:
                return next(messages)
        except Exception as error:
            self.fail(error)
        return RoundMessage(FAILED)

    def _process_files(self, fetcher: SourceFetcher) -> Iterator[RoundMessage]:
        """Process the files assigned to this process; yield a message for each round, without end."""
        while True:
            try:
                file = fetcher.next()
            except queue.Empty:
                yield RoundMessage(IDLE)
                continue
            if isinstance(file, Exception):
                raise file
            if file is None:
                break
            number, path = file
            yield from self._process_file(number, path)
            yield RoundMessage(END, number)
        while True:
            yield RoundMessage(DONE)

    def _process_file(self, number: int, path: Path) -> Iterator[RoundMessage]:
        """Write this process's slices of a source file; yield the slices of other processes in batches."""
        name = Path(self._job.files[number])
        reader = CheckpointReader(self._job.checkpoint, {name: path}, self._job.source.read)
        batches = BatchWriter(number)
        transfers = self._transfers_of(number)
        size, total = self._job.source.contents.sizes[name.name], sum(transfer.size_bytes for transfer in transfers)
        before, done, yielded_at = self._stored_bytes, 0, time.monotonic()
        for transfer in transfers:
            own = [(self._writers[rank], region) for rank, region in transfer.regions.items() if rank in self._writers]
            is_shared = len(own) < len(transfer.regions)
            for offset, chunk in split_into_chunks(reader.read_slice(transfer.slice_copy)):
                for writer, region in own:
                    writer.write(region, offset, chunk)
                if is_shared:
                    yield from batches.add(chunk)
            done += transfer.size_bytes
            self._stored_bytes = before + size * done // total
            if time.monotonic() - yielded_at > HEARTBEAT_S:
                yield RoundMessage(BATCH, number)
                yielded_at = time.monotonic()
        yield from batches.flush()

    def _exchange_slices(self, message: RoundMessage, headers: np.ndarray) -> None:
        """Exchange the batches of this round, and write what other processes sent for this one."""
        width = int(headers[:, 3].max())
        if not width:
            return
        padded = np.zeros(width, np.uint8)
        if message.data is not None:
            padded[: message.data.size] = message.data
        rows = self._gather(padded)
        for process, (kind, source, batch, length, *_) in enumerate(headers.tolist()):
            if kind == BATCH and length and process != self._group.rank:
                self._write_batch(source, process, batch, rows[process, :length])

    def _commit_sources(self, headers: np.ndarray) -> None:
        """Record the source files whose end was announced in this round."""
        for kind, source, *_ in headers.tolist():
            if kind == END:
                for rank in self._plan.missing_files[source]:
                    if rank in self._writers:
                        self._writers[rank].commit(source)
                self._transfers.pop(source, None)

    def _write_batch(self, source: int, process: int, batch: int, data: np.ndarray) -> None:
        """Write the slices of this process's ranks that a batch of another process holds."""
        start, stop = batch * BATCH_BYTES, batch * BATCH_BYTES + data.size
        transfers = [transfer for transfer in self._transfers_of(source) if transfer.regions.keys() - {process}]
        sizes = (transfer.size_bytes for transfer in transfers)
        offsets = self._offsets.setdefault((source, process), [0, *accumulate(sizes)])
        for index in range(bisect_right(offsets, start) - 1, len(transfers)):
            transfer, offset = transfers[index], offsets[index]
            if offset >= stop:
                break
            first, last = max(offset, start), min(offset + transfer.size_bytes, stop)
            for rank, region in transfer.regions.items():
                if rank in self._writers:
                    self._writers[rank].write(region, first - offset, data[first - start : last - start])

    def _transfers_of(self, source: int) -> list[SliceTransfer]:
        if source not in self._transfers:
            name = Path(self._job.files[source])
            missing_files = self._plan.missing_files[source]
            self._transfers[source] = slice_transfers(
                name, self._job.checkpoint, self._job.plan, missing_files, self._has_records
            )
        return self._transfers[source]

    def _has_records(self, rank: int, file: int) -> bool:
        return rank not in self._writers or self._writers[rank].has_records(file)

    def _gather(self, row: np.ndarray) -> np.ndarray:
        """Return the rows of all processes."""
        return np.array(self._group.gather(mx.array(row)))
