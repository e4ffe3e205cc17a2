"""Memory of the vision tower and of the encoding of an image, on the rank that holds the tower."""

from __future__ import annotations

from kimi_mlx.model.device_traits import FLOAT32_BYTES
from kimi_mlx.model.sizes import VISION_SCORES_MAX
from kimi_mlx.model.vision_config import VisionConfig
from kimi_mlx.sizing.image_features import LARGEST_IMAGE_TOKENS

MAX_PATCHES = 4 * LARGEST_IMAGE_TOKENS
"""Number of patches of the largest image, with padding."""


def tower_values(vision: VisionConfig) -> int:
    """Return the number of values of the matrices of the tower and its projector."""
    hidden, inner, merged = vision.vt_hidden_size, vision.vt_intermediate_size, vision.merged_size
    block = 4 * hidden * hidden + 2 * hidden * inner
    table = vision.init_pos_emb_height * vision.init_pos_emb_width * hidden
    projector = merged * (merged + vision.text_hidden_size)
    return vision.vt_num_hidden_layers * block + table + vision.patch_values * hidden + projector


def encode_bytes(vision: VisionConfig, value_bytes: int, is_fused: bool, patches: int = MAX_PATCHES) -> int:
    """Return the temporary memory of the encoding of an image, without its features: an upper estimate.

    A patch has hidden states, queries, keys and values, rotated ones in float32, and the inner states of the MLP with a
    copy in float32; only one block of the tower counts, since blocks run one after the other. Without a fused kernel,
    three arrays of scores exist at once (measured by tests/unit/sizing/test_vision.py).

    Args:
        vision: the tower's dimensions.
        value_bytes: bytes per value in the compute dtype.
        is_fused: whether MLX has a fused kernel for the tower's attention.
        patches: number of patches.
    """
    hidden, inner = vision.vt_hidden_size, vision.vt_intermediate_size
    per_patch = (6 * hidden + inner) * value_bytes + (4 * hidden + inner) * FLOAT32_BYTES
    scores = 0 if is_fused else 3 * min(VISION_SCORES_MAX, vision.vt_num_attention_heads * patches**2) * FLOAT32_BYTES
    return patches * per_patch + scores
