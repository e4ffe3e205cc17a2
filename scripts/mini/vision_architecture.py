"""Shape of kimi-mini-vl: kimi-mini's text model, and every feature of Kimi K2.5's vision tower in small."""

from __future__ import annotations

from typing import Any

from scripts.mini.architecture import CONFIG

VISION_CONFIG: dict[str, Any] = {
    "init_pos_emb_height": 16,
    "init_pos_emb_time": 4,
    "init_pos_emb_width": 16,
    "merge_kernel_size": [2, 2],
    "merge_type": "sd2_tpool",
    "mm_hidden_size": 144,
    "mm_projector_type": "patchmerger",
    "patch_size": 14,
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "projector_ln_eps": 1e-5,
    "text_hidden_size": CONFIG["hidden_size"],
    "video_attn_type": "spatial_temporal",
    "vt_hidden_size": 144,
    "vt_intermediate_size": 540,
    "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 4,
}
MAX_PATCHES = 96
"""Patches of the largest pictures in training. Larger pictures are reduced to it (`media_proc_cfg.in_patch_limit`)."""

D: int = VISION_CONFIG["vt_hidden_size"]
H: int = VISION_CONFIG["vt_num_attention_heads"]
F: int = VISION_CONFIG["vt_intermediate_size"]
BLOCKS: int = VISION_CONFIG["vt_num_hidden_layers"]
TABLE: int = VISION_CONFIG["init_pos_emb_height"]  # rows and columns of the position table
PATCH_SIZE: int = VISION_CONFIG["patch_size"]
CELL = 2 * PATCH_SIZE  # side of a token's square in pixels
PATCH_VALUES = 3 * PATCH_SIZE**2
TEXT_D: int = VISION_CONFIG["text_hidden_size"]
EPS = 1e-5
ROPE_BASE = 10_000.0
