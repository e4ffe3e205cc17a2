"""Build shard stores from the files of a checkpoint.

Either one process builds the stores of all ranks, or several processes, one per host, each build the store of their own
rank. With several, each source file is assigned to one process, which reads it and sends the others their slices
(rounds.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from kimi_mlx.errors import KimiMlxError
from kimi_mlx.files import write_atomically
from kimi_mlx.parallel.group import Group
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.manifest import Manifest
from kimi_mlx.store.rounds import BuildProgress, BuildRounds
from kimi_mlx.store.store_folders import rank_folder
from kimi_mlx.store.writer import RankWriter


def build_stores(
    job: BuildJob,
    ranks: Sequence[int],
    group: Group,
    report: Callable[[BuildProgress], None] = lambda progress: None,
    discard: Mapping[int, Sequence[str]] | None = None,
) -> list[Manifest]:
    """Build the stores of `ranks`, or resume building them.

    Args:
        job: the build, equal in all processes of the group.
        ranks: ranks whose stores this process builds: all ranks in a group of one, else the process's own rank.
        group: the processes.
        report: callback for progress, once a round.
        discard: rank -> broken files of its store, to be built again.

    Raises:
        WeightsError: in any process, the disk is full, a file cannot be fetched, or a folder is in use.
    """
    with ExitStack() as stack:
        rounds = BuildRounds(job, group, report)
        try:
            writers = {rank: stack.enter_context(_open_writer(job, rank)) for rank in ranks}
            for rank, names in (discard or {}).items():
                writers[rank].discard(names)
            _write_small_files(job)
        except (KimiMlxError, OSError) as error:
            rounds.fail(error)
            writers = {}
        rounds.run(writers)
        manifests = [writer.complete() for writer in writers.values()]
        job.source.finish()
        return manifests


def _open_writer(job: BuildJob, rank: int) -> RankWriter:
    origin = job.source.contents.origin
    plan = lambda file: job.plan(rank, file)  # noqa: E731
    return RankWriter(
        rank_folder(job.folder, rank),
        origin,
        job.placement,
        rank,
        job.num_layers,
        job.source_has_vision,
        plan,
        job.sources_of_file(rank),
    )


def _write_small_files(job: BuildJob) -> None:
    for name, data in job.source.contents.small_files.items():
        path = job.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)
