"""Dimensions of the vision tower (MoonViT-3D) and its projector, from `config.json` of K2.5 and later.

Field names are those of the published files. Does not import MLX.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kimi_mlx.errors import ConfigError, VisionError
from kimi_mlx.model.config_values import INVALID_HINT, ValueRange, check_fields, check_value, get_object

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches of an image (one frame) or of a chunk of a video."""

MODEL_TYPE = "kimi_k25"
"""`model_type` of the models whose tower this is; Kimi-VL has another one."""

MIN_SLICE = 64
"""Smallest number of patches in a slice of a block."""

CHANNELS = 3
"""Colours of a pixel."""


@dataclass(frozen=True)
class VisionConfig:
    """Dimensions and constants of the vision tower and its projector; sizes in elements, images in patches.

    Args:
        vt_hidden_size: size of a patch's hidden state.
        vt_intermediate_size: inner size of a block's MLP.
        vt_num_attention_heads: number of attention heads.
        vt_num_hidden_layers: number of blocks.
        init_pos_emb_height: rows of the position table.
        init_pos_emb_width: columns of the position table.
        init_pos_emb_time: maximum number of frames.
        text_hidden_size: size of a feature: the hidden size of the text model.
        media_placeholder_token_id: token that is replaced by a feature, one token per feature.
        patch_size: height and width of a patch in pixels.
        projector_ln_eps: epsilon of the projector's norm.
        merge_kernel_size: rows and columns of patches that become one feature.
    """

    vt_hidden_size: int
    vt_intermediate_size: int
    vt_num_attention_heads: int
    vt_num_hidden_layers: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    init_pos_emb_time: int
    text_hidden_size: int
    media_placeholder_token_id: int
    patch_size: int = 14
    projector_ln_eps: float = 1e-5
    merge_kernel_size: tuple[int, int] = (2, 2)

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.vt_hidden_size // self.vt_num_attention_heads

    @property
    def patch_values(self) -> int:
        """Number of values of a patch."""
        return CHANNELS * self.patch_size**2

    @property
    def merged_size(self) -> int:
        """Size of the hidden states that become one feature."""
        return math.prod(self.merge_kernel_size) * self.vt_hidden_size

    def num_tokens(self, grid: Grid) -> int:
        """Return the number of features of an image, which is that of its tokens.

        Frames do not count: features are means over the frames.

        Raises:
            VisionError: the tower does not take this grid.
        """
        self.check_grid(grid)
        return grid[1] * grid[2] // math.prod(self.merge_kernel_size)

    def check_grid(self, grid: Grid) -> None:
        """Check that the tower takes a grid.

        Raises:
            VisionError: too many frames, or rows or columns that are not whole merged patches.
        """
        frames, rows, columns = grid
        merged_rows, merged_columns = self.merge_kernel_size
        if not 1 <= frames <= self.init_pos_emb_time:
            raise VisionError(f"grid {grid} has {frames} frames; the model takes 1 to {self.init_pos_emb_time}")
        if min(rows, columns) < 1 or rows % merged_rows or columns % merged_columns:
            raise VisionError(
                f"grid {grid} has {rows} x {columns} patches; both numbers must be positive multiples of "
                f"{merged_rows} and {merged_columns}"
            )

    def layer_multiply_adds(self, grids: Sequence[Grid]) -> int:
        """Return the multiply-adds of one block for these images, each with attention to itself."""
        hidden = self.vt_hidden_size
        per_patch = 4 * hidden**2 + 2 * hidden * self.vt_intermediate_size
        return sum(n * per_patch + 2 * n**2 * hidden for n in map(math.prod, grids))

    def layers_per_part(self, grids: Sequence[Grid], part_multiply_adds: int) -> int:
        """Return the number of blocks in a part of the encoding of these images, at least one.

        Args:
            grids: grids of the images.
            part_multiply_adds: largest number of multiply-adds of a part with several blocks.
        """
        return max(1, min(self.vt_num_hidden_layers, part_multiply_adds // self.layer_multiply_adds(grids)))

    def num_parts(self, grids: Sequence[Grid], part_multiply_adds: int) -> int:
        """Return the number of parts of the encoding of these images; arguments as in layers_per_part."""
        num_groups = -(-self.vt_num_hidden_layers // self.layers_per_part(grids, part_multiply_adds))
        return num_groups * self.slices_per_layer(grids, part_multiply_adds)

    def slices_per_layer(self, grids: Sequence[Grid], part_multiply_adds: int) -> int:
        """Return the number of parts into which a block is divided: 1 if it fits the budget, or for several images.

        Args:
            grids: grids of the images.
            part_multiply_adds: largest number of multiply-adds of a part.
        """
        if len(grids) > 1:
            return 1
        needed = -(-self.layer_multiply_adds(grids) // max(part_multiply_adds, 1))
        return max(1, min(needed, math.prod(grids[0]) // MIN_SLICE))


EXPECTED = {
    "merge_type": "sd2_tpool",
    "mm_projector_type": "patchmerger",
    "pos_emb_type": "divided_fixed",
    "projector_hidden_act": "gelu",
    "video_attn_type": "spatial_temporal",
    "hidden_act": "gelu_pytorch_tanh",
}
"""Supported values of fields of `vision_config` that name a variant; the last one is transformers'."""

TRANSFORMERS_NAMES = {
    "hidden_size": "vt_hidden_size",
    "intermediate_size": "vt_intermediate_size",
    "num_attention_heads": "vt_num_attention_heads",
    "num_hidden_layers": "vt_num_hidden_layers",
    "pos_emb_height": "init_pos_emb_height",
    "pos_emb_width": "init_pos_emb_width",
    "pos_emb_time": "init_pos_emb_time",
    "image_token_id": "media_placeholder_token_id",
    "projection_layer_norm_eps": "projector_ln_eps",
}
"""Names in files that transformers has written, and the published ones; the last two are at the top level."""


def parse_vision(outer: Mapping[str, Any], hidden_size: int, where: str) -> VisionConfig | None:
    """Parse `vision_config`.

    Args:
        outer: contents of `config.json`.
        hidden_size: hidden size of the text model.
        where: name of the file, for messages.

    Returns:
        None if the file is not of K2.5 or later, or has no `vision_config` or an empty one.

    Raises:
        ConfigError: an unsupported variant, a missing field or an invalid value.
    """
    block = get_object(outer, "vision_config", where)
    if not block or outer.get("model_type") != MODEL_TYPE:
        return None
    prefix = "vision_config."
    top = {name: outer[name] for name in ("image_token_id", "projection_layer_norm_eps") if name in outer}
    raw = {TRANSFORMERS_NAMES[name]: value for name, value in {**block, **top}.items() if name in TRANSFORMERS_NAMES}
    raw |= {"text_hidden_size": hidden_size, **block}
    if outer.get("media_placeholder_token_id") is not None:
        raw["media_placeholder_token_id"] = outer["media_placeholder_token_id"]
    for name, value in EXPECTED.items():
        if raw.get(name, value) != value:
            raise ConfigError(
                f"`{where}` has {prefix}{name} = {reprlib.repr(raw[name])}; only {value!r} is supported",
                hint=INVALID_HINT,
            )
    fields = check_fields(VisionConfig, raw, where, prefix)
    config = VisionConfig(**fields, merge_kernel_size=_parse_merge_size(raw, where, prefix))
    _reject_contradictions(config, raw, hidden_size, where)
    return config


def _parse_merge_size(raw: Mapping[str, Any], where: str, prefix: str) -> tuple[int, int]:
    name = prefix + "merge_kernel_size"
    size = raw.get("merge_kernel_size", (2, 2))
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        raise ConfigError(f"`{where}` has {name} = {reprlib.repr(size)}, not two whole numbers", hint=INVALID_HINT)
    rows, columns = (check_value(value, "int", ValueRange(1, 64), where, name) for value in size)
    return rows, columns


def _reject_contradictions(config: VisionConfig, raw: Mapping[str, Any], hidden_size: int, where: str) -> None:
    hidden, heads = config.vt_hidden_size, config.vt_num_attention_heads
    if hidden % (4 * heads):  # half of a head's pairs rotate by the row, half by the column
        raise ConfigError(
            f"`{where}`: vision_config.vt_hidden_size is {hidden}, not a multiple of 4 x vt_num_attention_heads = "
            f"{4 * heads}",
            hint=INVALID_HINT,
        )
    if config.text_hidden_size != hidden_size:
        raise ConfigError(
            f"`{where}`: vision_config.text_hidden_size is {config.text_hidden_size}, but the text model has "
            f"hidden_size {hidden_size}",
            hint=INVALID_HINT,
        )
    if raw.get("mm_hidden_size", hidden) != hidden:
        raise ConfigError(
            f"`{where}`: vision_config.mm_hidden_size is {reprlib.repr(raw['mm_hidden_size'])}, but vt_hidden_size is "
            f"{hidden}",
            hint=INVALID_HINT,
        )
