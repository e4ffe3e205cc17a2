"""Find the folder of a checkpoint (never of a store), and download it if it is not on this machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kimi_mlx.cli.fetch_model import fetch
from kimi_mlx.cli.output import slow_status
from kimi_mlx.hub.client import find_local, look_up
from kimi_mlx.store.model_ref import ModelRef


def checkpoint_folder(target: ModelRef, no_vision: bool, is_quiet: bool) -> Path:
    """Return the folder of a checkpoint.

    Args:
        target: the model.
        no_vision: whether to skip the vision tower in a download.
        is_quiet: whether to print neither progress nor notices.

    Raises:
        KimiMlxError: the checkpoint cannot be downloaded.
    """
    if target.repository is None:
        assert target.folder is not None
        return target.folder
    folder = find_local(target.repository)
    if folder is not None:
        return folder
    with slow_status(is_quiet) as set_status:
        set_status(f"asking Hugging Face for the files of {target.name}")
        repository = look_up(target.repository)
    return fetch(target, replace(repository, skips_vision=no_vision), is_quiet)
