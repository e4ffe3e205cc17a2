"""Plan which source files a build needs, for which store files, and which process fetches each. Equal on all ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kimi_mlx.parallel.group import Group
from kimi_mlx.store.assign import assign_files
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.writer import RankWriter


@dataclass(frozen=True)
class TransferPlan:
    """Source files that a build still needs.

    Args:
        missing_files: number of a source file -> rank -> numbers of the rank's unfinished store files that it fills.
        sizes: number of a source file -> its size in bytes.
        assignments: for each process, the numbers of the source files that it fetches.
    """

    missing_files: Mapping[int, Mapping[int, list[int]]]
    sizes: Mapping[int, int]
    assignments: list[list[int]]

    @property
    def total_bytes(self) -> int:
        """Bytes of all needed source files."""
        return sum(self.sizes.values())


def plan_transfers(job: BuildJob, group: Group, writers: Mapping[int, RankWriter]) -> TransferPlan:
    """Gather the state of every rank's store, and plan the rest of the build.

    Args:
        job: the build.
        group: the processes.
        writers: the writer of each rank that this process builds; empty after an error in this process.
    """
    num_files, num_sources = job.num_layers + 2, len(job.files)
    states, local_bytes = _gather_states(job, group, writers)
    missing_files: dict[int, Mapping[int, list[int]]] = {}
    ranks = range(job.placement.world_size)
    sources_of_file = [job.sources_of_file(rank) for rank in ranks]
    for source in range(num_sources):
        files_of_rank = {
            rank: [file for file in range(num_files) if states[rank, file] and source in sources_of_file[rank][file]]
            for rank in ranks
            if states[rank, num_files + source]
        }
        if files_of_rank:
            missing_files[source] = files_of_rank
    sizes = {source: job.source.contents.sizes[job.files[source]] for source in missing_files}
    assignments = assign_files(sizes, group.size, lambda process, source: int(local_bytes[process, source]))
    return TransferPlan(missing_files, sizes, assignments)


def _gather_states(job: BuildJob, group: Group, writers: Mapping[int, RankWriter]) -> tuple[np.ndarray, np.ndarray]:
    """Return the states of all ranks' stores and of all processes' disks.

    Returns:
        For each rank, 1 for each unfinished store file, then 1 for each source file that it needs: (ranks, store files
        + source files). For each process, the bytes of each source file on its disk: (processes, source files).
    """
    num_ranks, num_files, num_sources = job.placement.world_size, job.num_layers + 2, len(job.files)
    rows = np.zeros((num_ranks // group.size, num_files + 2 * num_sources), np.int64)  # one row per own rank
    rows[:, num_files + num_sources :] = [job.source.local_bytes(file) for file in job.files]
    for row, writer in zip(rows, writers.values(), strict=False):
        row[writer.unfinished] = 1
        row[num_files : num_files + num_sources] = [writer.needs_source(source) for source in range(num_sources)]
    gathered = np.array(group.gather(mx.array(rows)))
    states = gathered[:, :, : num_files + num_sources].reshape(num_ranks, num_files + num_sources)
    return states, gathered[:, 0, num_files + num_sources :]
