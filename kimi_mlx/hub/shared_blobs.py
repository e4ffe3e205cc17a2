"""Blobs that repositories in the Hugging Face cache share: links to `<cache>/blobs/`, made by hf-xet downloads.

Source: huggingface_hub.utils._shared_blobs. It is private, so everything here does nothing if it has changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kimi_mlx.hub.environment import hub_cache


def shared_blobs(folder: Path) -> list[Path]:
    """Return the shared blobs to which a repository's folder links."""
    try:
        from huggingface_hub.utils._shared_blobs import shared_blob_target
    except ImportError:
        return []
    targets = (shared_blob_target(path, hub_cache()) for path in folder.glob("blobs/*"))
    return [target for target in targets if target is not None]


def freed_bytes(folder: Path) -> int:
    """Return the size of the shared blobs that no other repository links to."""
    try:
        from huggingface_hub.utils._shared_blobs import expected_shared_blob_freed_size
    except ImportError:
        return 0
    links = set(folder.glob("blobs/*"))
    return sum(
        expected_shared_blob_freed_size(blob, blob_paths_to_delete=links, cache_dir=hub_cache())
        for blob in shared_blobs(folder)
    )


def remove_unused(blobs: Iterable[Path]) -> None:
    """Delete those shared blobs to which no repository links any more."""
    try:
        from huggingface_hub.utils._shared_blobs import sweep_shared_blob
    except ImportError:
        return
    for blob in blobs:
        sweep_shared_blob(blob, cache_dir=hub_cache())
