"""`vision_config` of K2.5 and later: published and transformers' names, grids, parts, and files that are rejected."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import ConfigError, VisionError
from kimi_mlx.model.vision_config import Grid, VisionConfig, parse_vision

PUBLISHED: dict[str, Any] = {
    "init_pos_emb_height": 64,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 64,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 1152,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-05,
    "text_hidden_size": 7168,
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 1152,
    "vt_intermediate_size": 4304,
    "vt_num_attention_heads": 16,
    "vt_num_hidden_layers": 27,
}
"""`vision_config` of K2.5, K2.6 and K2.7."""

OF_TRANSFORMERS: dict[str, Any] = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "merge_kernel_size": [2, 2],
    "model_type": "kimi_k25_vision",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "pos_emb_height": 64,
    "pos_emb_time": 4,
    "pos_emb_width": 64,
}


def parse(block: Any, **top: Any) -> VisionConfig | None:
    outer = {"model_type": "kimi_k25", "media_placeholder_token_id": 163605, "vision_config": block, **top}
    return parse_vision(outer, 7168, "config.json")


def published() -> VisionConfig:
    config = parse(PUBLISHED)
    assert config is not None
    return config


def test_published_config() -> None:
    config = published()
    assert (config.head_dim, config.patch_values, config.merged_size) == (72, 588, 4608)
    assert (config.text_hidden_size, config.media_placeholder_token_id) == (7168, 163605)


def test_transformers_names_are_the_published_ones() -> None:
    top = {"media_placeholder_token_id": None, "image_token_id": 163605, "projection_layer_norm_eps": 1e-5}
    assert parse(OF_TRANSFORMERS, **top) == published()


@pytest.mark.parametrize("block", [None, {}])
def test_a_text_model_has_no_tower(block: Any) -> None:
    assert parse(block) is None
    assert parse_vision({"model_type": "kimi_vl", "vision_config": {"hidden_size": 1152}}, 2048, "config.json") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge_type": "sd2"}, "merge_type = 'sd2'; only 'sd2_tpool'"),
        ({"pos_emb_type": "rope"}, "pos_emb_type = 'rope'"),
        ({"mm_projector_type": "mlp"}, "mm_projector_type = 'mlp'"),
        ({"projector_hidden_act": "silu"}, "projector_hidden_act = 'silu'"),
        ({"merge_kernel_size": 2}, "merge_kernel_size = 2, not two whole numbers"),
        ({"merge_kernel_size": [2, 0]}, "merge_kernel_size = 0, not a whole number from 1"),
        ({"vt_num_hidden_layers": 0}, "vision_config.vt_num_hidden_layers = 0, not a whole number from 1 to 1000"),
        ({"vt_hidden_size": "1152"}, "vision_config.vt_hidden_size = '1152', not a whole number"),
        ({"vt_intermediate_size": None}, "lacks `vision_config.vt_intermediate_size`"),
        ({"vt_num_attention_heads": 15}, "1152, not a multiple of 4 x vt_num_attention_heads = 60"),
        ({"text_hidden_size": 4096}, "text_hidden_size is 4096, but the text model has hidden_size 7168"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, but vt_hidden_size is 1152"),
        ({"projector_ln_eps": 0}, "projector_ln_eps = 0"),
    ],
)
def test_unsupported_towers_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse({**PUBLISHED, **changes})


def test_a_placeholder_is_needed() -> None:
    with pytest.raises(ConfigError, match=r"lacks `vision_config\.media_placeholder_token_id`"):
        parse(PUBLISHED, media_placeholder_token_id=None)


def test_tokens_of_an_image_and_of_a_chunk_of_frames() -> None:
    config = published()
    assert config.num_tokens((1, 128, 128)) == 4096
    assert config.num_tokens((1, 2, 2)) == 1
    assert config.num_tokens((4, 6, 8)) == config.num_tokens((1, 6, 8)) == 12


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ((0, 2, 2), "has 0 frames; the model takes 1 to 4"),
        ((5, 2, 2), "has 5 frames; the model takes 1 to 4"),
        ((1, 3, 2), "has 3 x 2 patches; both numbers must be positive multiples of 2 and 2"),
        ((1, 0, 2), "has 0 x 2 patches"),
        ((1, -2, -2), "has -2 x -2 patches"),
    ],
)
def test_grids_that_the_tower_does_not_take(grid: Grid, message: str) -> None:
    with pytest.raises(VisionError, match=re.escape(message)):
        published().num_tokens(grid)


def test_a_part_of_the_largest_image_is_half_a_block() -> None:
    config = published()
    largest = [(1, 128, 128)]
    assert config.layer_multiply_adds(largest) == pytest.approx(8.7e11, rel=0.01)
    assert config.num_parts(largest, 5 * 10**11) == 54
    assert config.num_parts(largest, 10**12) == 27
    assert config.num_parts([(1, 2, 2)], 5 * 10**11) == 1


GRIDS = st.lists(st.tuples(st.integers(1, 4), *(st.integers(1, 64).map(lambda n: 2 * n),) * 2), min_size=1, max_size=3)


@given(grids=GRIDS, budget=st.integers(0, 10**14))
def test_parts_keep_to_the_budget_and_cover_all_blocks(grids: list[Grid], budget: int) -> None:
    config = published()
    layers, parts = config.layers_per_part(grids, budget), config.num_parts(grids, budget)
    slices = config.slices_per_layer(grids, budget)
    assert min(layers, slices) == 1
    assert (parts - slices) * layers < config.vt_num_hidden_layers * slices <= parts * layers
    assert layers == 1 or layers * config.layer_multiply_adds(grids) <= budget
    assert sum(map(config.num_tokens, grids)) * 4 == sum(math.prod(grid[1:]) for grid in grids)
