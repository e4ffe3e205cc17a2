"""Map tensor names of a vision tower and its projector to the entries of the canonical tree (kimi_mlx.model.tree).

Checkpoints come with the published names or with mlx-vlm's, float or quantized.
"""

from __future__ import annotations

from kimi_mlx.model.names import CheckpointLayout, SourceMatrix, TreeEntry, single_entry
from kimi_mlx.model.vision_config import CHANNELS, VisionConfig

VISION_PATH, PROJECTOR_PATH = "vision_tower.", "mm_projector."

VISION_PREFIXES = (VISION_PATH, PROJECTOR_PATH)
"""Prefixes of the tensors of K2.5's vision tower and its projector."""


def is_vision(name: str) -> bool:
    """Return whether a tensor is one of the vision tower or its projector."""
    return name.startswith(VISION_PREFIXES)


def vision_entries(config: VisionConfig, layout: CheckpointLayout) -> list[TreeEntry]:
    """Return the entries of the vision tower and its projector, named as published: one per matrix and one per bias.

    The embedding of patches is stored as a convolution (D, 3, height, width) and used as a matrix with as many columns
    as a patch has values. mlx-vlm stores it as (D, height, width, 3), and has other names for the blocks (its
    models/kimi_k25/vision.py).
    """
    hidden, merged = config.vt_hidden_size, config.merged_size
    kernel = (CHANNELS, config.patch_size, config.patch_size)
    is_of_mlx_vlm = layout.has(f"{VISION_PATH}final_layernorm.weight")
    table = (config.init_pos_emb_height, config.init_pos_emb_width, hidden)
    shapes: dict[str, tuple[int, ...]] = {
        f"{VISION_PATH}encoder.final_layernorm": (hidden,),
        f"{PROJECTOR_PATH}pre_norm": (hidden,),
        f"{PROJECTOR_PATH}proj.0": (merged, merged),
        f"{PROJECTOR_PATH}proj.2": (config.text_hidden_size, merged),
    }
    for index in range(config.vt_num_hidden_layers):
        path = f"{VISION_PATH}encoder.blocks.{index}."
        shapes |= {path + name: shape for name, shape in _vision_block_shapes(config).items()}
    embed = f"{VISION_PATH}patch_embed."
    patches = SourceMatrix((f"{embed}proj",), (hidden, config.patch_values), kernel=kernel)
    entries = [
        TreeEntry(f"{embed}proj", ((patches,),)),
        single_entry(f"{embed}proj.bias", f"{embed}proj", (hidden,), suffix=".bias"),
        single_entry(f"{embed}pos_emb", f"{embed}pos_emb", table),
    ]
    for name, shape in shapes.items():
        path = _mlx_vlm_path(name) if is_of_mlx_vlm else name
        entries += [single_entry(name, path, shape), single_entry(f"{name}.bias", path, shape[:1], suffix=".bias")]
    return entries


def _mlx_vlm_path(path: str) -> str:
    return path.replace("encoder.", "").replace(".wqkv", ".attn.wqkv").replace(".wo", ".attn.wo")


def _vision_block_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.vt_hidden_size, config.vt_intermediate_size
    return {
        "norm0": (hidden,),
        "norm1": (hidden,),
        "wqkv": (3 * hidden, hidden),
        "wo": (hidden, hidden),
        "mlp.fc0": (inner, hidden),
        "mlp.fc1": (hidden, inner),
    }
