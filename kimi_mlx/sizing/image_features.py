"""Size of the image features that an engine keeps."""

from __future__ import annotations

from kimi_mlx.model.config import ModelConfig

LARGEST_IMAGE_TOKENS = 4464
"""Number of features of the largest image: 16,384 whole patches (`in_patch_limit`) and padding, four to a feature."""

FEATURE_SHARE = 0.05
"""Share of the free memory for features."""

MAX_IMAGES = 16
"""Number of the largest images whose features are kept at most: 0.9 GB for K2.5 in bfloat16."""


def feature_bytes(config: ModelConfig, num_tokens: int, value_bytes: int) -> int:
    """Return the size of features.

    Args:
        config: the model's dimensions.
        num_tokens: number of features; an image has one for each of its tokens.
        value_bytes: bytes per value.
    """
    return num_tokens * config.hidden_size * value_bytes


def feature_budget(config: ModelConfig, free_bytes: int, value_bytes: int) -> int:
    """Return the number of features that a rank keeps: at least those of the largest image; 0 without vision.

    Args:
        config: the model's dimensions.
        free_bytes: memory that is free once the weights are loaded.
        value_bytes: bytes per value.
    """
    if config.vision is None:
        return 0
    fitting = int(FEATURE_SHARE * free_bytes) // feature_bytes(config, 1, value_bytes)
    return min(max(fitting, LARGEST_IMAGE_TOKENS), MAX_IMAGES * LARGEST_IMAGE_TOKENS)
