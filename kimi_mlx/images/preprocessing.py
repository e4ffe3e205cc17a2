"""Settings of the image preprocessing of a checkpoint: `media_proc_cfg` in `preprocessor_config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from kimi_mlx.errors import ConfigError
from kimi_mlx.files import read_regular_file
from kimi_mlx.images.resize import MERGE, PATCH_SIZE

CONFIG_FILE = "preprocessor_config.json"
FIXED: Mapping[str, tuple[Any, ...]] = {
    "patch_size": (PATCH_SIZE,),
    "merge_kernel_size": (MERGE, [MERGE, MERGE]),
    "image_mean": (0.5, [0.5, 0.5, 0.5]),
    "image_std": (0.5, [0.5, 0.5, 0.5]),
    "timestamp_mode": ("hh:mm:ss.fff",),
    "fixed_output_tokens": (None,),
    "in_patch_limit_video": (None,),
    "max_num_frames_each_video": (None,),
}
"""Supported values of the settings that all published checkpoints share."""
HINT = "use the file of the published checkpoint"
MAX_CHUNK_FRAMES = 4
"""Largest number of frames for which the vision tower has embeddings of time."""


@dataclass(frozen=True)
class Preprocessing:
    """How images and videos become patches. The names are those of `media_proc_cfg`, the defaults those of Kimi K2.5.

    Args:
        in_patch_limit: limit of the whole patches of an image, before padding. With padding, an image has up to 17,856
            patches and 4,464 tokens (489 x 7,081 pixels); 1,792 x 1,792 pixels have 16,384 and 4,096.
        in_patch_limit_each_frame: the same for a frame of a video: up to 1,338 tokens with padding.
        patch_limit_on_one_side: limit of the patches in a row or column.
        sample_fps: frames per second of a video that the model sees; a slower video is seen whole.
        temporal_merge_kernel_size: number of frames that are encoded together, at most 4.

    Raises:
        ConfigError: a value is not supported.
    """

    in_patch_limit: int = 16_384
    in_patch_limit_each_frame: int = 4_096
    patch_limit_on_one_side: int = 512
    sample_fps: float = 2.0
    temporal_merge_kernel_size: int = MAX_CHUNK_FRAMES

    def __post_init__(self) -> None:
        """Check the values."""
        for item in fields(self):
            value = getattr(self, item.name)
            kind = (int, float) if item.name == "sample_fps" else int
            if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(f"`media_proc_cfg.{item.name}` is {value!r}, not a number above 0")
        if self.temporal_merge_kernel_size > MAX_CHUNK_FRAMES:
            name, value = "temporal_merge_kernel_size", self.temporal_merge_kernel_size
            raise ConfigError(f"`media_proc_cfg.{name}` is {value}, more than {MAX_CHUNK_FRAMES}")

    @classmethod
    def load(cls, folder: Path) -> Preprocessing:
        """Read the settings of a checkpoint; those of Kimi K2.5 if its folder has no `media_proc_cfg`.

        Raises:
            ConfigError: the file is broken, or a value is not supported.
        """
        path = folder / CONFIG_FILE
        if not path.exists():
            return cls()
        try:
            config: Any = json.loads(read_regular_file(path))
            values = cast("dict[str, Any]", config.get("media_proc_cfg") or {})
            for name, supported in FIXED.items():
                if values.get(name, supported[0]) not in supported:
                    raise ConfigError(
                        f"`media_proc_cfg.{name}` is {values[name]!r}; only {supported[0]!r} is supported"
                    )
            return cls(**{item.name: values[item.name] for item in fields(cls) if item.name in values})
        except ConfigError as error:
            raise ConfigError(f"`{path}`: {error.message}", hint=HINT) from error
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise ConfigError(f"`{path}` is not a preprocessor configuration: {error}", hint=HINT) from error


DEFAULT_PREPROCESSING = Preprocessing()
"""The settings that Moonshot publishes with Kimi K2.5, K2.6 and K2.7."""
