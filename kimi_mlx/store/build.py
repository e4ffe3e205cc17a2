"""Building shard stores: source files one by one, each slice to the ranks that need it.

One process builds the stores of all ranks, or each of several processes (a host each) builds its own: then the source
files are dealt out, and every process sends what the others need over the group. All processes run the same rounds; a
round tells who has what to say, carries it, and is the barrier after which a source file may be freed.
"""

from __future__ import annotations

import queue
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import KimiMlxError, RingError, WeightsError
from kimi_mlx.files import write_atomically
from kimi_mlx.hub.retries import Cancelled
from kimi_mlx.parallel.all_ranks import raise_if_any_failed
from kimi_mlx.parallel.group import Group
from kimi_mlx.parallel.placement import Placement
from kimi_mlx.store.manifest import Manifest
from kimi_mlx.store.sources import CheckpointSource
from kimi_mlx.store.stores import rank_folder, store_folder
from kimi_mlx.store.transfers import SliceTransfer, slice_transfers, split_into_chunks
from kimi_mlx.store.writer import RankWriter, check_space, write_error
from kimi_mlx.weights.checkpoint import Checkpoint, is_ignored
from kimi_mlx.weights.layer_plan import LayerPlan, plan_layer, plan_top
from kimi_mlx.weights.reader import Reader

BATCH_BYTES = 1 << 24
"""What a process sends in a round."""

IDLE_S = 0.02
SILENT_S = 0.1
FILES_AHEAD = 2
"""Source files of a process that are on the disk at a time, at work or on their way."""

NOTHING = frozenset[int]()

IDLE, BATCH, END, DONE, FAILED = range(5)
"""What a process says in a round: nothing yet, a part of a source file, its end, that it has no more, an error."""


@dataclass(frozen=True)
class BuildProgress:
    """How far a build has come, over all processes.

    Args:
        fetched_bytes: of the source files.
        stored_bytes: of the source files, as far as they are worked up.
        total_bytes: of the source files that are needed.
    """

    fetched_bytes: int
    stored_bytes: int
    total_bytes: int


class BuildJob:
    """What is to be built; pure, and the same in every process.

    Args:
        sources: where the files come from.
        checkpoint: their table.
        placement: of all ranks.
        stores: where stores are kept.
    """

    def __init__(self, sources: CheckpointSource, checkpoint: Checkpoint, placement: Placement, stores: Path):
        self.sources, self.checkpoint, self.placement = sources, checkpoint, placement
        self.folder = store_folder(stores, sources.contents.origin, placement)
        self.files = sorted(sources.contents.sizes)
        self.num_layers = checkpoint.config.num_hidden_layers
        self.plan = lru_cache(maxsize=8 * placement.world_size)(self._plan)
        self._feeds = self._find_feeds()

    def size_bytes(self, rank: int) -> int:
        """What a rank will hold."""
        return sum(self._plan(rank, file).size_bytes for file in range(self.num_layers + 1))

    def feeds(self, rank: int) -> list[frozenset[int]]:
        """For each file of a rank's store the numbers of the source files that it is made of."""
        share = self.placement.shares[rank]
        held = set(range(share.layers.start, share.layers.stop))
        if len(share.embed_rows) or len(share.vocab_rows):
            held.add(self.num_layers)
        return [feed if file in held else NOTHING for file, feed in enumerate(self._feeds)]

    def _plan(self, rank: int, file: int) -> LayerPlan:
        share = self.placement.shares[rank]
        if file == self.num_layers:
            return plan_top(self.checkpoint, share)
        return plan_layer(self.checkpoint, file, share)

    def _find_feeds(self) -> list[frozenset[int]]:
        """The same, if all of the model is held."""
        numbers = {name: number for number, name in enumerate(self.files)}
        feeds: list[set[int]] = [set() for _ in range(self.num_layers + 1)]
        for name, info in self.checkpoint.tensors.items():
            if not is_ignored(name, self.checkpoint.config):
                parts = name.split(".")
                layer = int(parts[2]) if parts[:2] == ["model", "layers"] else self.num_layers
                feeds[layer].add(numbers[info.file.name])
        return [frozenset(each) for each in feeds]


def build_stores(
    job: BuildJob,
    ranks: Sequence[int],
    group: Group,
    report: Callable[[BuildProgress], None] = lambda progress: None,
    discard: Mapping[int, Sequence[str]] | None = None,
) -> list[Manifest]:
    """Build, or go on building, the stores of `ranks`.

    Args:
        job: the same in all processes of the group.
        ranks: whose stores this process builds: all if it is alone, else the one of its number.
        group: the processes.
        report: called now and then.
        discard: for each rank the files of its store that are broken and made anew.

    Raises:
        WeightsError: in any process: a full disk, a file that cannot be fetched, a folder in use.
    """
    with ExitStack() as stack:
        rounds = _Rounds(job, group, report)
        try:
            writers = {rank: stack.enter_context(_writer(job, rank)) for rank in ranks}
            for rank, names in (discard or {}).items():
                writers[rank].discard(names)
            _write_small_files(job)
        except (KimiMlxError, OSError) as error:
            rounds.fail(error)
            writers = {}
        rounds.run(writers)
        manifests = [writer.complete() for writer in writers.values()]
        job.sources.finish()
        return manifests


def _writer(job: BuildJob, rank: int) -> RankWriter:
    origin = job.sources.contents.origin
    plan = lambda file: job.plan(rank, file)  # noqa: E731
    return RankWriter(rank_folder(job.folder, rank), origin, job.placement, rank, plan, job.feeds(rank))


def _write_small_files(job: BuildJob) -> None:
    for name, data in job.sources.contents.small.items():
        path = job.folder / name
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)


def assign_files(
    sizes: Mapping[int, int], processes: int, held: Callable[[int, int], int] = lambda process, number: 0
) -> list[list[int]]:
    """Deal files out so that every process gets about as many bytes.

    Args:
        sizes: of the files, by number.
        processes: how many there are.
        held: (process, number) -> bytes of the file that the process has already; the one with most of it gets it.

    Returns:
        For each process its files: those it has something of, then the others, in their order.
    """
    hands: list[list[int]] = [[] for _ in range(processes)]
    weights = [0] * processes
    most = {number: max(held(process, number) for process in range(processes)) for number in sizes}
    for number in sorted(sizes, key=lambda number: (-most[number], -sizes[number], number)):
        best = [process for process in range(processes) if held(process, number) == most[number]]
        process = min(best, key=lambda process: weights[process])
        hands[process].append(number)
        weights[process] += sizes[number]
    return [sorted(hand, key=lambda number: (-held(process, number), number)) for process, hand in enumerate(hands)]


class _Fetcher:
    """Threads that fetch this process's files: as many at a time as may be on the disk besides those at work."""

    def __init__(self, job: BuildJob, files: Sequence[int]):
        self._job, self._left = job, iter(files)
        self._lock = threading.Lock()
        self._fetched = 0
        self._slots = threading.Semaphore(FILES_AHEAD)
        self._missing = len(files)
        self._ready: queue.SimpleQueue[tuple[int, Path] | Exception] = queue.SimpleQueue()
        self._is_stopped = threading.Event()

    @property
    def fetched_bytes(self) -> int:
        """Of all files so far."""
        return self._fetched

    def start(self) -> None:
        for _ in range(FILES_AHEAD):
            threading.Thread(target=self._run, daemon=True).start()

    def next(self) -> tuple[int, Path] | Exception | None:
        """The next file, an error, or None behind the last; raises queue.Empty while there is nothing."""
        if not self._missing:
            return None
        found = self._ready.get_nowait()
        self._missing -= 1
        return found

    def release(self, number: int) -> None:
        self._job.sources.release(self._job.files[number])
        self._slots.release()

    def stop(self) -> None:
        self._is_stopped.set()
        for _ in range(FILES_AHEAD):
            self._slots.release()

    def _run(self) -> None:
        try:
            while True:
                self._slots.acquire()
                with self._lock:
                    number = next(self._left, None)
                if number is None or self._is_stopped.is_set():
                    return
                path = self._job.sources.fetch(self._job.files[number], self._count, self._is_stopped)
                self._ready.put((number, path))
        except Cancelled:
            pass
        except Exception as error:  # the process that waits for this thread must hear of whatever ended it
            self._ready.put(error)

    def _count(self, delta: int) -> None:
        with self._lock:
            self._fetched += delta


@dataclass
class _Saying:
    """What this process says in a round."""

    kind: int
    source: int = 0
    batch: int = 0
    data: np.ndarray | None = None


class _Rounds:
    """The rounds of one build in one process."""

    def __init__(self, job: BuildJob, group: Group, report: Callable[[BuildProgress], None]):
        self._job, self._group, self._report = job, group, report
        self._failure: KimiMlxError | None = None
        self._writers: dict[int, RankWriter] = {}
        self._parcels: dict[int, list[SliceTransfer]] = {}
        self._begins: dict[tuple[int, int], list[int]] = {}
        self._wanted: dict[int, dict[int, list[int]]] = {}
        self._total_bytes = self._stored_bytes = 0
        self._hands: list[list[int]] = []

    def fail(self, error: Exception) -> None:
        """Tell everybody in the next round."""
        if isinstance(error, KimiMlxError):
            self._failure = error
        elif isinstance(error, OSError):
            self._failure = write_error(self._job.folder, error)
        else:  # a mistake of ours: nobody may wait for this process for ever
            failure = WeightsError(f"the build has failed: {error!r}", hint="type the command again; report it")
            failure.__cause__ = error
            self._failure = failure

    def run(self, writers: dict[int, RankWriter]) -> None:
        """Until every store is full."""
        self._writers = writers
        self._agree()
        mine = self._hands[self._group.rank]
        if self._failure is None:
            self._check_space(mine)
        fetcher = _Fetcher(self._job, mine)
        if self._failure is None:
            fetcher.start()
        try:
            self._go_round(fetcher)
        finally:
            fetcher.stop()

    def _agree(self) -> None:
        """Learn what every rank lacks, and assign_files out the source files."""
        job, ranks = self._job, self._job.placement.world_size
        files, sources = job.num_layers + 1, len(job.files)
        mine = np.zeros((ranks // self._group.size, files + 2 * sources), np.int64)
        mine[:, files + sources :] = [job.sources.held_bytes(file) for file in job.files]
        for row, writer in zip(mine, self._writers.values(), strict=False):
            row[writer.unfinished] = 1
            row[files : files + sources] = [writer.needs(source) for source in range(sources)]
        gathered = self._gather(mine)
        held = gathered[:, 0, files + sources :]
        states = gathered.reshape(ranks, files + 2 * sources)
        sizes: dict[int, int] = {}
        feeds = [job.feeds(rank) for rank in range(ranks)]
        for source in range(sources):
            wanted = {
                rank: [file for file in range(files) if states[rank, file] and source in feeds[rank][file]]
                for rank in range(ranks)
                if states[rank, files + source]
            }
            if wanted:
                self._wanted[source] = wanted
                sizes[source] = job.sources.contents.sizes[job.files[source]]
        self._total_bytes = sum(sizes.values())
        self._hands = assign_files(sizes, self._group.size, lambda process, source: int(held[process, source]))

    def _check_space(self, mine: Sequence[int]) -> None:
        try:
            missing = sum(writer.missing_bytes for writer in self._writers.values())
            extra = self._job.sources.extra_bytes(self._job.files[number] for number in mine)
            check_space(self._job.folder, missing + extra)
        except (KimiMlxError, OSError) as error:
            self.fail(error)

    def _go_round(self, fetcher: _Fetcher) -> None:
        work = self._work(fetcher)
        to_release: list[int] = []
        is_done = False
        while not is_done:
            saying = self._say(work)
            heads = self._gather_heads(saying, fetcher.fetched_bytes)
            kinds = heads[:, 0]
            if (kinds == FAILED).any():
                raise_if_any_failed(self._group, self._failure)
            for number in to_release:  # everybody has recorded it: this round was the barrier
                fetcher.release(number)
            to_release = [saying.source] if saying.kind == END else []
            self._report(BuildProgress(int(heads[:, 4].sum()), int(heads[:, 5].sum()), self._total_bytes))
            try:
                self._carry(saying, heads)
            except RingError:
                raise
            except Exception as error:
                self.fail(error)
            is_done = bool((kinds == DONE).all())
            if not is_done and not np.isin(kinds, (BATCH, END)).any():
                time.sleep(IDLE_S)

    def _say(self, work: Iterator[_Saying]) -> _Saying:
        try:
            if self._failure is None:
                return next(work)
        except Exception as error:
            self.fail(error)
        return _Saying(FAILED)

    def _work(self, fetcher: _Fetcher) -> Iterator[_Saying]:
        """What this process does with its files, and what it says about it; without end."""
        while True:
            try:
                found = fetcher.next()
            except queue.Empty:
                yield _Saying(IDLE)
                continue
            if isinstance(found, Exception):
                raise found
            if found is None:
                break
            number, path = found
            yield from self._work_up(number, path)
            yield _Saying(END, number)
        while True:
            yield _Saying(DONE)

    def _work_up(self, number: int, path: Path) -> Iterator[_Saying]:
        """Write this process's slices of a source file, and hand the others' out in batches."""
        name = Path(self._job.files[number])
        reader = Reader(self._job.checkpoint, {name: path}, self._job.sources.read)
        batches = _Batches(number)
        parcels = self._parcels_of(number)
        size, total = self._job.sources.contents.sizes[name.name], sum(parcel.size_bytes for parcel in parcels)
        before, done, said_at = self._stored_bytes, 0, time.monotonic()
        for parcel in parcels:
            own = [(self._writers[rank], place) for rank, place in parcel.targets.items() if rank in self._writers]
            is_shared = len(own) < len(parcel.targets)
            for offset, piece in split_into_chunks(reader.take(parcel.move)):
                for writer, place in own:
                    writer.write(place, offset, piece)
                if is_shared:
                    yield from batches.add(piece)
            done += parcel.size_bytes
            self._stored_bytes = before + size * done // total
            if time.monotonic() - said_at > SILENT_S:  # the others wait for a word, and progress is shown
                yield _Saying(BATCH, number)
                said_at = time.monotonic()
        yield from batches.rest()

    def _carry(self, saying: _Saying, heads: np.ndarray) -> None:
        """Exchange this round's batches, and record the source files that have come to their end."""
        width = int(heads[:, 3].max())
        if width:
            padded = np.zeros(width, np.uint8)
            if saying.data is not None:
                padded[: saying.data.size] = saying.data
            rows = self._gather(padded)
            for process, (kind, source, batch, length, *_) in enumerate(heads.tolist()):
                if kind == BATCH and length and process != self._group.rank:
                    self._take(source, process, batch, rows[process, :length])
        for kind, source, *_ in heads.tolist():
            if kind == END:
                for rank in self._wanted[source]:
                    if rank in self._writers:
                        self._writers[rank].commit(source)
                self._parcels.pop(source, None)

    def _take(self, source: int, process: int, batch: int, data: np.ndarray) -> None:
        """Write what is for this process's ranks out of a batch of another process."""
        start, stop = batch * BATCH_BYTES, batch * BATCH_BYTES + data.size
        parcels = [parcel for parcel in self._parcels_of(source) if parcel.targets.keys() - {process}]
        begins = self._begins.setdefault((source, process), [0, *accumulate(parcel.size_bytes for parcel in parcels)])
        for index in range(bisect_right(begins, start) - 1, len(parcels)):
            parcel, begin = parcels[index], begins[index]
            if begin >= stop:
                break
            first, last = max(begin, start), min(begin + parcel.size_bytes, stop)
            for rank, place in parcel.targets.items():
                if rank in self._writers:
                    self._writers[rank].write(place, first - begin, data[first - start : last - start])

    def _parcels_of(self, source: int) -> list[SliceTransfer]:
        if source not in self._parcels:
            name = Path(self._job.files[source])
            self._parcels[source] = slice_transfers(name, self._job.checkpoint, self._job.plan, self._wanted[source])
        return self._parcels[source]

    def _gather_heads(self, saying: _Saying, fetched_bytes: int) -> np.ndarray:
        length = 0 if saying.data is None else saying.data.size
        head = [saying.kind, saying.source, saying.batch, length, fetched_bytes, self._stored_bytes]
        return self._gather(np.array(head, np.int64))

    def _gather(self, row: np.ndarray) -> np.ndarray:
        """Everybody's row."""
        return np.array(self._group.gather(mx.array(row)))


class _Batches:
    """Pieces joined into batches of equal size: what goes to other processes out of one source file."""

    def __init__(self, source: int):
        self._source = source
        self._parts: list[np.ndarray] = []
        self._size = self._number = 0

    def add(self, piece: np.ndarray) -> Iterator[_Saying]:
        """Take a piece in; yields the batches that are full."""
        while piece.size:
            room = BATCH_BYTES - self._size
            self._parts.append(piece[:room])
            self._size += self._parts[-1].size
            piece = piece[room:]
            if self._size == BATCH_BYTES:
                yield self._batch()

    def rest(self) -> Iterator[_Saying]:
        """The last batch, if there is something left."""
        if self._size:
            yield self._batch()

    def _batch(self) -> _Saying:
        saying = _Saying(BATCH, self._source, self._number, np.concatenate(self._parts))
        self._parts, self._size = [], 0
        self._number += 1
        return saying
