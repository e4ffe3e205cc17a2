"""Checks that a model sees images, before it is downloaded or loaded."""

from __future__ import annotations

from pathlib import Path

from kimi_mlx.errors import EngineError
from kimi_mlx.model.config import load_config
from kimi_mlx.store.model_ref import ModelRef
from kimi_mlx.store.vision import no_vision_error, sees_images


def require_vision(folder: Path, name: str) -> None:
    """Check that a model on this machine has a vision tower.

    Args:
        folder: checkpoint, or folder of a placement's stores.
        name: the user's name for the model.

    Raises:
        EngineError: the model has none; the hint says how to add it, if it can be added.
    """
    config = load_config(folder)
    if not sees_images(folder, config):
        raise no_vision_error(folder, config, name)


def require_vision_in_catalogue(target: ModelRef) -> None:
    """Check that the catalogue lists a model with a vision tower; a model that it does not know passes.

    Raises:
        EngineError: the model has none.
    """
    if target.entry is not None and not target.entry.sees_images:
        raise EngineError(f"`{target.name}` does not see images", hint="`kimi-mlx models` lists models that do")
