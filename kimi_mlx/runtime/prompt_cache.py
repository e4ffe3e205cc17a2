"""The prompt cache on disk of a loaded model: what its blocks depend on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kimi_mlx import __version__
from kimi_mlx.engine.block_store import BlockStore
from kimi_mlx.engine.cache import shape_of
from kimi_mlx.model.decoder import Model
from kimi_mlx.runtime.load import Fingerprint


def open_blocks(
    cache_dir: Path,
    max_bytes: int,
    model: Model,
    fingerprint: Fingerprint,
    rank: int = 0,
    world_size: int = 1,
    ranks_here: int = 1,
    warn: Callable[[str], None] = lambda text: None,
) -> BlockStore:
    """Open the blocks of a model, or of a rank's share of it; where that is not possible there are none, with a word.

    Args:
        cache_dir: made if missing.
        max_bytes: of all that is in it.
        model: loaded.
        fingerprint: of its weights, see kimi_mlx.runtime.load.
        rank: this one.
        world_size: ranks in all.
        ranks_here: ranks on this host.
        warn: told what is wrong, from any thread.
    """
    shape = shape_of(model)
    key = json.dumps([__version__, fingerprint.common, str(shape.dtype), world_size])
    share = f"rank-{rank}-of-{world_size}"
    return BlockStore(cache_dir.expanduser(), key, share, fingerprint.here, shape, max_bytes, ranks_here, warn)
