"""Disk space of stores, and errors of the disk."""

from __future__ import annotations

import os
from pathlib import Path

from kimi_mlx.errors import WeightsError
from kimi_mlx.files import is_disk_full
from kimi_mlx.units import format_bytes


def check_space(folder: Path, needed_bytes: int) -> None:
    """Check the free space before a build.

    Raises:
        WeightsError: the disk of `folder` has less than `needed_bytes` free.
    """
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed_bytes > free:
        raise WeightsError(
            f"`{folder}` needs {format_bytes(needed_bytes)} more, but its disk has {format_bytes(free)} free",
            hint="free some space, or set KIMI_MLX_STORES to a folder on a larger disk",
        )


def write_error(path: Path, error: OSError) -> WeightsError:
    """Return the error for a file that cannot be written."""
    if is_disk_full(error):
        return WeightsError(
            f"the disk is full: `{path}` cannot be written",
            hint="free some space, then run the same command again to resume",
        )
    return WeightsError(
        f"`{path}` cannot be written: {error.strerror}",
        hint="check its owner and permissions, or set KIMI_MLX_STORES to another folder",
    )


def store_disk_bytes(folder: Path) -> int:
    """Return the disk space used by the weights of a rank's store, complete or not."""
    return sum(map(allocated_bytes, folder.glob("*.safetensors*")))


def allocated_bytes(path: Path) -> int:
    """Return the disk space used by a file; 0 if it does not exist."""
    return path.stat().st_blocks * 512 if path.is_file() else 0
