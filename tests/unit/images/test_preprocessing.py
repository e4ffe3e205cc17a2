"""Settings of the preprocessing in `preprocessor_config.json`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kimi_mlx.errors import ConfigError
from kimi_mlx.images.prepare import prepare_image
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING, Preprocessing

PUBLISHED = {
    "in_patch_limit": 16384,
    "patch_size": 14,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_kernel_size": 2,
    "fixed_output_tokens": None,
    "patch_limit_on_one_side": 512,
    "in_patch_limit_each_frame": 4096,
    "in_patch_limit_video": None,
    "sample_fps": 2.0,
    "max_num_frames_each_video": None,
    "temporal_merge_kernel_size": 4,
    "timestamp_mode": "hh:mm:ss.fff",
    "config_type": "media_proc.processors.moonvit.MoonViTMediaProcessorConfig",
}


def load(folder: Path, config: Any) -> Preprocessing:
    (folder / "preprocessor_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return Preprocessing.load(folder)


def test_the_published_file_and_no_file_are_the_defaults(tmp_path: Path) -> None:
    assert Preprocessing.load(tmp_path) == DEFAULT_PREPROCESSING
    assert load(tmp_path, {"media_proc_cfg": PUBLISHED, "auto_map": {}}) == DEFAULT_PREPROCESSING
    assert load(tmp_path, {"image_processor_type": "KimiK25ImageProcessor"}) == DEFAULT_PREPROCESSING


def test_limits_of_a_checkpoint_are_used(tmp_path: Path) -> None:
    small = load(tmp_path, {"media_proc_cfg": {**PUBLISHED, "in_patch_limit": 96, "patch_limit_on_one_side": 20}})
    buffer = io.BytesIO()
    Image.new("RGB", (1000, 500)).save(buffer, "PNG")
    assert prepare_image(buffer.getvalue(), "x", preprocessing=small).grid == (1, 8, 14)
    assert prepare_image(buffer.getvalue(), "x").grid == (1, 36, 72)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "`media_proc_cfg.patch_size` is 16; only 14 is supported"),
        ({"image_mean": [0.4, 0.5, 0.5]}, "image_mean"),
        ({"merge_kernel_size": 3}, "merge_kernel_size"),
        ({"fixed_output_tokens": 64}, "fixed_output_tokens"),
        ({"in_patch_limit": 0}, "`media_proc_cfg.in_patch_limit` is 0, not a number above 0"),
        ({"in_patch_limit": "many"}, "in_patch_limit"),
        ({"sample_fps": None}, "sample_fps"),
        ({"temporal_merge_kernel_size": 8}, "is 8, more than 4"),
    ],
)
def test_other_values_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json") as raised:
        load(tmp_path, {"media_proc_cfg": {**PUBLISHED, **changes}})
    assert message in raised.value.message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"media_proc_cfg": 3}', '{"media_proc_cfg": [1]}'])
def test_broken_files_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
        load(tmp_path, text)
