"""The user's folders for what kimi-mlx keeps: caches, state and data, where the system and XDG's variables say."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path | None:
    """Where to keep what can be made again; None for a user without a home."""
    return _folder("XDG_CACHE_HOME", ".cache", "Caches")


def state_folder() -> Path | None:
    """Where to keep the history of chats; None for a user without a home."""
    return _folder("XDG_STATE_HOME", ".local/state", "Application Support")


def data_folder() -> Path | None:
    """Where to keep what was made at some cost, such as shard stores; None for a user without a home."""
    return _folder("XDG_DATA_HOME", ".local/share", "Application Support")


def stores_folder() -> Path | None:
    """Where shard stores are kept: in KIMI_MLX_STORES, else with the user's data; None for a user without a home."""
    if chosen := os.environ.get("KIMI_MLX_STORES"):
        return Path(os.path.expanduser(chosen))
    folder = data_folder()
    return None if folder is None else folder / "stores"


def _folder(variable: str, usual: str, on_macos: str) -> Path | None:
    base = os.environ.get(variable, "")
    if os.path.isabs(base):  # the specification tells to ignore other values
        return Path(base) / "kimi-mlx"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return (home / "Library" / on_macos if sys.platform == "darwin" else home / usual) / "kimi-mlx"
