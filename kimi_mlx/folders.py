"""The user's folders for caches, state, data and configuration, by the system's conventions and XDG variables."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLES = (
    *("KIMI_MLX_STORES", "HF_HUB_CACHE", "HF_HOME", "TMPDIR", "HOME"),
    *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"),
)
"""Environment variables that name folders of ours, or of libraries."""


def cache_folder() -> Path | None:
    """Return the folder for files that can be recreated; None for a user without a home folder."""
    return _folder("XDG_CACHE_HOME", ".cache", "Caches")


def state_folder() -> Path | None:
    """Return the folder for the history of chats; None for a user without a home folder."""
    return _folder("XDG_STATE_HOME", ".local/state", "Application Support")


def data_folder() -> Path | None:
    """Return the folder for expensive files, such as shard stores; None for a user without a home folder."""
    return _folder("XDG_DATA_HOME", ".local/share", "Application Support")


def config_folder() -> Path | None:
    """Return the folder of `config.toml` and of presets; None for a user without a home folder."""
    return _folder("XDG_CONFIG_HOME", ".config", "Application Support")


def stores_folder() -> Path | None:
    """Return KIMI_MLX_STORES, else the stores in `data_folder`; None for a user without a home folder."""
    if chosen := os.environ.get("KIMI_MLX_STORES"):
        return Path(os.path.expanduser(chosen))
    folder = data_folder()
    return None if folder is None else folder / "stores"


def variable_of(path: str) -> str | None:
    """Return the environment variable to set so that a file is looked for elsewhere; None if there is none."""
    folders: dict[str, str | Path | None] = {name: os.environ.get(name) for name in VARIABLES if name != "HOME"}
    folders |= {"XDG_CACHE_HOME": cache_folder(), "XDG_STATE_HOME": state_folder(), "KIMI_MLX_STORES": stores_folder()}
    folders["HF_HOME"] = folders["HF_HOME"] or "~/.cache/huggingface"
    known = {name: os.path.expanduser(folder) for name, folder in folders.items() if folder}
    names = [name for name, folder in known.items() if f"{path}/".startswith(f"{folder}/")]
    return max(names, key=lambda name: len(known[name]), default=None)


def _folder(variable: str, linux_path: str, macos_name: str) -> Path | None:
    base = os.environ.get(variable, "")
    if os.path.isabs(base):  # the XDG specification requires that relative paths are ignored
        return Path(base) / "kimi-mlx"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return (home / "Library" / macos_name if sys.platform == "darwin" else home / linux_path) / "kimi-mlx"
