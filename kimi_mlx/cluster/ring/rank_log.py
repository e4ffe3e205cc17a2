"""What ranks write to their standard error, and note, in a file each; those of earlier runs are kept for a while."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from kimi_mlx.folders import state_folder

KEPT_FILES = 64


def open_logs(size: int) -> list[Path | None]:
    """Where each rank's words go, if it has any: `logs/<day>-<time>-<process>-rank-<n>.log` in the user's state folder.

    Returns:
        Their paths; None for a user without a home, or one that cannot be written.
    """
    state = state_folder()
    if state is None:
        return [None] * size
    folder = state / "logs"
    name = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*-rank-*.log"), key=lambda file: file.name)[: -KEPT_FILES or None]:
            with contextlib.suppress(FileNotFoundError):  # another front tidies up, too
                old.unlink()
    except OSError:
        return [None] * size
    return [folder / f"{name}-rank-{rank}.log" for rank in range(size)]
