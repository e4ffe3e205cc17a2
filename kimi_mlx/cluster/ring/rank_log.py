"""Log files of ranks: their standard error and notes. The newest KEPT_FILES of earlier runs are kept."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from kimi_mlx.folders import state_folder

KEPT_FILES = 64


def open_logs(size: int) -> list[Path | None]:
    """Return the paths of the log files: `logs/<day>-<time>-<process>-rank-<n>.log` in the user's state folder.

    A file is created when a rank writes. The paths are None if there is no home folder, or it cannot be written.
    """
    state = state_folder()
    if state is None:
        return [None] * size
    folder = state / "logs"
    name = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for old in sorted(folder.glob("*-rank-*.log"), key=lambda file: file.name)[: -KEPT_FILES or None]:
            with contextlib.suppress(FileNotFoundError):  # another front removes it at the same time
                old.unlink()
    except OSError:
        return [None] * size
    return [folder / f"{name}-rank-{rank}.log" for rank in range(size)]
