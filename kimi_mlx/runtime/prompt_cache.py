"""Open the prompt cache on disk for a loaded model, with the blocks that all ranks have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kimi_mlx.engine.kv_cache_pool import shape_of
from kimi_mlx.engine.prompt_cache.block_file import NAME_BYTES
from kimi_mlx.engine.prompt_cache.block_store import BlockStore
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.group import Group, SingleGroup, gather_on_host
from kimi_mlx.runtime.load import Fingerprint
from kimi_mlx.version import __version__


def open_prompt_cache(
    cache_dir: Path,
    max_bytes: int,
    model: Model,
    fingerprint: Fingerprint,
    group: Group | None = None,
    num_local_ranks: int = 1,
    warn: Callable[[str], None] = lambda text: None,
) -> BlockStore:
    """Open the blocks of a model, or of one rank's share of it. If that fails, warn and continue without blocks.

    Args:
        cache_dir: folder of the cache; created if missing.
        max_bytes: size limit of the folder.
        model: loaded model.
        fingerprint: fingerprint of its weights, see kimi_mlx.runtime.load.
        group: ranks that share the model. All must call this at the same time, and get the same blocks.
        num_local_ranks: number of ranks on this host.
        warn: callback for warnings, called from any thread.
    """
    group = group or SingleGroup()
    shape = shape_of(model)
    key = json.dumps([__version__, fingerprint.shared, str(shape.dtype), group.size])
    share = f"rank-{group.rank}-of-{group.size}"
    store = BlockStore(cache_dir.expanduser(), key, share, fingerprint.local, shape, max_bytes, num_local_ranks, warn)
    if group.size > 1:
        keep_common_blocks(store, group)
    return store


def keep_common_blocks(store: BlockStore, group: Group) -> None:
    """Keep only the blocks that all ranks have, in the order of rank 0. This takes two gathers."""
    names = store.names()
    counts, capacities = gather_on_host(group, [len(names), store.capacity]).T
    table = np.zeros((max(counts.max(), 1), NAME_BYTES), np.uint8)
    table[: len(names)] = np.frombuffer(bytes.fromhex("".join(names)), np.uint8).reshape(-1, NAME_BYTES)
    tables = gather_on_host(group, table)
    names_of_ranks = [[row.tobytes().hex() for row in rows[:count]] for rows, count in zip(tables, counts, strict=True)]
    common = set.intersection(*map(set, names_of_ranks))
    store.keep([name for name in names_of_ranks[0] if name in common], int(capacities.min()))
