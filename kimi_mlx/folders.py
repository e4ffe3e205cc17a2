"""The user's folders for caches, state and data of kimi-mlx, following the system's conventions and XDG variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Return the folder for files that can be recreated; None for a user without a home folder."""
    return _folder("XDG_CACHE_HOME", ".cache", "Caches")


def state_folder() -> Path | None:
    """Return the folder for the history of chats; None for a user without a home folder."""
    return _folder("XDG_STATE_HOME", ".local/state", "Application Support")


def data_folder() -> Path | None:
    """Return the folder for expensive files, such as shard stores; None for a user without a home folder."""
    return _folder("XDG_DATA_HOME", ".local/share", "Application Support")


def stores_folder() -> Path | None:
    """Return KIMI_MLX_STORES, else the stores in `data_folder`; None for a user without a home folder."""
    if chosen := os.environ.get("KIMI_MLX_STORES"):
        return Path(os.path.expanduser(chosen))
    folder = data_folder()
    return None if folder is None else folder / "stores"


def _folder(variable: str, linux_path: str, macos_name: str) -> Path | None:
    base = os.environ.get(variable, "")
    if os.path.isabs(base):  # the XDG specification requires that relative paths are ignored
        return Path(base) / "kimi-mlx"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return (home / "Library" / macos_name if sys.platform == "darwin" else home / linux_path) / "kimi-mlx"
