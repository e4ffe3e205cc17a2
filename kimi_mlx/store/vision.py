"""Whether the weights of a model on this machine have its vision tower, and how to add it."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.errors import EngineError
from kimi_mlx.hub.catalogue import catalogue
from kimi_mlx.model.config import ModelConfig, load_config
from kimi_mlx.model_files import CACHED_FILE
from kimi_mlx.store.manifest import read_manifest
from kimi_mlx.store.store_folders import download_command, rank_folder, stored_ranks
from kimi_mlx.weights.index import has_vision, lacks_vision


def checkpoint_lacks_vision(folder: Path) -> bool:
    """Return whether files of the vision tower are missing in the folder of a checkpoint whose model has one."""
    return load_config(folder).vision is not None and lacks_vision(folder)


def store_lacks_vision(folder: Path) -> bool:
    """Return whether the store of rank 0 has no vision tower although its source may have one.

    Args:
        folder: folder of the placement.
    """
    manifest = read_manifest(rank_folder(folder, 0))
    is_possible = manifest.source_has_vision is not False and load_config(folder).vision is not None
    return is_possible and manifest.vision is None


def sees_images(folder: Path, config: ModelConfig) -> bool:
    """Return whether a model on this machine has a vision tower.

    Without the store of rank 0, which holds the tower, it is that of another host if the source has one.

    Args:
        folder: checkpoint, or folder of a placement's stores.
        config: configuration of the model.

    Raises:
        WeightsError: unreadable files.
    """
    if config.vision is None:
        return False
    if not (ranks := stored_ranks(folder)):
        return has_vision(folder)
    manifest = read_manifest(rank_folder(folder, ranks[0]))
    return manifest.vision is not None if manifest.rank == 0 else bool(manifest.source_has_vision)


def no_vision_error(folder: Path, config: ModelConfig, name: str | None = None) -> EngineError:
    """Return the error for an image that a model without a vision tower gets: the reason, and how to add the tower.

    Args:
        folder: checkpoint, or folder of a placement's stores.
        config: configuration of the model.
        name: the user's name for the model; None for its repository, its alias or its folder.
    """
    ranks = stored_ranks(folder)
    manifest = read_manifest(rank_folder(folder, ranks[0])) if ranks else None
    if name is None:
        name = name_of_checkpoint(folder) if manifest is None else manifest.origin.repository
    if config.vision is None:
        return EngineError(f"`{name}` does not see images", hint="`kimi-mlx models` lists models that do")
    if manifest is not None:
        command = download_command(name, manifest.placement.world_size, manifest.placement.strategy)
        can_be_added = manifest.source_has_vision is not False
    else:
        command, can_be_added = f"kimi-mlx download {name}", lacks_vision(folder)
    if can_be_added and manifest is None and CACHED_FILE.search(f"{folder}/") is None:
        return EngineError(
            f"`{name}` does not see images: files of its vision tower are missing in `{folder}`",
            hint="copy the files that its `model.safetensors.index.json` lists",
        )
    if can_be_added:
        return EngineError(
            f"`{name}` does not see images: its vision tower is not on this machine",
            hint=f"`{command}` adds it; the rest is not downloaded again",
        )
    return EngineError(
        f"`{name}` does not see images: this checkpoint has no vision tower",
        hint="use a checkpoint that has one, such as the original of its authors: `kimi-mlx models` lists them",
    )


def name_of_checkpoint(folder: Path) -> str:
    """Return `owner/name` of a folder in the Hugging Face cache, the alias of a bundled model, else the folder."""
    if (match := CACHED_FILE.search(f"{folder}/")) is not None:
        return f"{match[1]}/{match[2]}"
    aliases = (entry.alias for entry in catalogue() if entry.packaged_folder() == folder)
    return next(aliases, str(folder))
