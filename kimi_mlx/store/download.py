"""Build shard stores from a repository or folder: for all ranks on one machine, or for one rank per host of a group."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import RingError, UsageError
from kimi_mlx.hub.client import find_local, find_repository
from kimi_mlx.parallel.all_ranks import check_same_on_all_ranks, run_on_all_ranks
from kimi_mlx.parallel.checked_group import CheckedGroup
from kimi_mlx.parallel.group import Group, MlxGroup, SingleGroup
from kimi_mlx.parallel.placement import normalize_strategy, place
from kimi_mlx.parallel.ring_sockets import find_connections, find_ring_sockets
from kimi_mlx.store.build import build_stores
from kimi_mlx.store.build_job import BuildJob
from kimi_mlx.store.folder_source import FolderSource
from kimi_mlx.store.hub_source import HubSource, decode_contents, encode_contents, read_contents
from kimi_mlx.store.journal import newest_commit
from kimi_mlx.store.locate import find_store
from kimi_mlx.store.manifest import FORMAT, Manifest
from kimi_mlx.store.messages import BATCH_BYTES
from kimi_mlx.store.rounds import BuildProgress
from kimi_mlx.store.sources import CheckpointSource
from kimi_mlx.store.store_folders import commit_folder, folder_prefix
from kimi_mlx.store.stores import LocalStore
from kimi_mlx.version import __version__
from kimi_mlx.weights.checkpoint import Checkpoint
from kimi_mlx.weights.layer_plan import split_granularity_of

STORED_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""Type of decoded FP8 weights in a store, by the compute dtype of the model."""


@dataclass(frozen=True)
class StoreOptions:
    """Description of the stores to build.

    Args:
        source: folder of a checkpoint, or repository `owner/name` on the hub.
        stores: root folder of all stores.
        ranks: number of ranks that share the model.
        strategy: strategy of the placement.
        revision: branch, tag or commit of the repository; None for the one on this machine, else the main branch.
        keep_source: whether to keep the fetched files, in the hub's cache.
        skips_vision: whether to leave out the vision tower.
    """

    source: Path | str
    stores: Path
    ranks: int
    strategy: str = "hybrid"
    revision: str | None = None
    keep_source: bool = False
    skips_vision: bool = False

    def __post_init__(self) -> None:
        """Normalize the strategy."""
        object.__setattr__(self, "strategy", normalize_strategy(self.strategy, self.ranks))


def join_group() -> Group:
    """Join the group given by MLX's environment variables (set by `mlx.launch`), or return a group of one.

    Raises:
        RingError: cannot connect to the other processes.
    """
    if "MLX_RANK" not in os.environ:
        return SingleGroup()
    try:
        group = MlxGroup(mx.distributed.init(strict=True))
    except RuntimeError as error:
        raise RingError(
            f"cannot join the group of hosts: {error}",
            hint="check the hostfile, and that all hosts are running",
        ) from error
    return CheckedGroup(group, _connections(group.rank))


def _connections(rank: int) -> list[int]:
    """Return the sockets to other hosts: of MLX's ring, or of JACCL's rank 0 to all others."""
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return find_connections([coordinator], [coordinator])
    hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text(encoding="utf-8"))
    return find_ring_sockets(hosts, rank)


def find_built_stores(options: StoreOptions, group: Group) -> LocalStore | None:
    """Return the stores if they are complete: those of all ranks, or in a group the one of each host's own rank."""
    needed_ranks = None if group.size == 1 else [group.rank]
    name, revision = str(options.source), options.revision
    if isinstance(options.source, Path):  # its files may have changed since the stores were built
        folder = options.source
        origin = run_on_all_ranks(group, lambda: FolderSource(folder)).contents.origin
        name, revision = origin.repository, origin.commit
    store = find_store(options.stores, name, options.ranks, options.strategy, revision, needed_ranks)
    identity = "" if store is None else f"{store.origin.commit} {store.placement.digest}"
    rows = np.array(group.gather(mx.array(np.frombuffer(identity.encode().ljust(64), np.uint8))))
    return store if (rows == rows[0]).all() else None


def any_host(flag: bool, group: Group) -> bool:
    """Return whether a flag is set on any host."""
    return bool(np.array(group.gather(mx.array([flag]))).any())


def open_build_job(options: StoreOptions, group: Group) -> BuildJob:
    """Read configuration and headers, and plan the build. Only rank 0 requests them from the hub.

    Raises:
        ConfigError: the model is not supported.
        WeightsError: the repository cannot be fetched, or the checkpoint has missing or unknown tensors.
        PlacementError: the model cannot be split over this number of ranks.
    """
    source = _open_source(options, group)

    def plan() -> BuildJob:
        contents = source.contents
        config = contents.config()
        dtype = STORED_FLOATS.get(config.dtype, "F32")
        whole = Checkpoint(config, contents.table, contents.origin.repository, dtype)
        source_has_vision = whole.has_vision or contents.lacks_vision if config.vision is not None else None
        if options.skips_vision:
            config = replace(config, vision=None)
        checkpoint = Checkpoint(config, contents.table, contents.origin.repository, dtype)
        checkpoint.check_names()
        placement = place(config, options.strategy, options.ranks, split_granularity_of(checkpoint, options.strategy))
        return BuildJob(source, checkpoint, placement, options.stores, source_has_vision)

    job = run_on_all_ranks(group, plan)
    identity = f"{__version__} {FORMAT} {BATCH_BYTES} {job.placement.digest} {source.contents.origin.commit} "
    identity += str(job.checkpoint.has_vision)
    check_same_on_all_ranks(
        group,
        identity,
        "version of kimi-mlx, or another checkpoint,",
        "install the same version on all hosts, and use the same repository or equal folders",
    )
    return job


def build(
    options: StoreOptions,
    job: BuildJob,
    group: Group,
    report: Callable[[BuildProgress], None] = lambda progress: None,
    discard: Mapping[int, Sequence[str]] | None = None,
) -> list[Manifest]:
    """Build the stores: of all ranks in a group of one, else of this process's rank.

    Args:
        options: options that were given to open_build_job.
        job: result of open_build_job.
        group: group of the hosts.
        report: callback for progress.
        discard: rank -> broken files of its store, to be built again.

    Raises:
        WeightsError: on any host, the disk is full, a file cannot be fetched, or a folder is in use.
    """
    if group.size not in (1, options.ranks):
        raise UsageError(f"{options.ranks} ranks over {group.size} hosts", hint=f"use `--ranks {group.size}`")
    ranks = range(options.ranks) if group.size == 1 else [group.rank]
    return build_stores(job, ranks, group, report, discard)


def _open_source(options: StoreOptions, group: Group) -> CheckpointSource:
    if isinstance(options.source, Path):
        folder = options.source
        return run_on_all_ranks(group, lambda: FolderSource(folder))
    name, revision = options.source, options.revision
    if revision is None:  # stay at the commit of an existing store, or of the checkpoint on this machine
        snapshot = find_local(name)
        revision = newest_commit(options.stores, name, options.ranks, options.strategy) or (snapshot and snapshot.name)
    if group.size == 1:
        repository = replace(find_repository(name, revision), skips_vision=options.skips_vision)
        contents = read_contents(repository)
    else:
        encoded = run_on_all_ranks(group, lambda: _read_encoded(options, revision) if group.rank == 0 else b"")
        repository, contents = decode_contents(_broadcast(encoded, group))
    root = commit_folder(options.stores, contents.origin) / "sources"
    # a separate folder, because other placements may be built at the same time
    folder = root / f"{folder_prefix(options.strategy, options.ranks)}host-{group.rank}"
    return HubSource(repository, contents, folder, options.keep_source, options.revision or "main")


def _read_encoded(options: StoreOptions, revision: str | None) -> bytes:
    repository = replace(find_repository(str(options.source), revision), skips_vision=options.skips_vision)
    return encode_contents(repository, read_contents(repository))


def _broadcast(data: bytes, group: Group) -> bytes:
    """Return the bytes of rank 0 on all ranks; the other ranks pass empty bytes."""
    length = int(np.array(group.gather(mx.array([len(data)], mx.int32))).max())
    row = np.frombuffer(data.ljust(length), np.uint8)
    return np.array(group.gather(mx.array(row)))[0].tobytes()
