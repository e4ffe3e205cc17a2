"""mlx-vlm's vision tower of Kimi K2.5, as the other side of a benchmark. mlx-vlm is not a dependency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import mlx.core as mx

from kimi_mlx.bench.random_tower import Tensors
from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.install_command import install_command
from kimi_mlx.model.vision_config import Grid, VisionConfig

MODULE = "mlx_vlm.models.kimi_k25"

EncodeImages = Callable[[mx.array, Sequence[Grid]], mx.array]
"""Returns the features (T, text_hidden_size) of patches (P, 3, patch_size, patch_size) in -1..1, evaluated."""


def require_mlx_vlm() -> None:
    """Check that mlx-vlm has the model.

    Raises:
        UsageError: it is not installed, or has no Kimi K2.5.
    """
    try:
        import_module(MODULE)
    except ImportError as error:
        raise UsageError(
            f"--against mlx-vlm needs mlx-vlm with Kimi K2.5: {error}", hint=f"run `{install_command('mlx-vlm')}`"
        ) from error


def open_mlx_vlm_tower(config: VisionConfig, tensors: Tensors, dtype: mx.Dtype) -> EncodeImages:
    """Return mlx-vlm's tower with its projector.

    Args:
        config: dimensions.
        tensors: weights by their published names.
        dtype: type to compute in.

    Raises:
        WeightsError: mlx-vlm refuses the weights.
    """
    module: Any = import_module(MODULE)
    vision = module.VisionConfig(
        depth=config.vt_num_hidden_layers,
        embed_dim=config.vt_hidden_size,
        hidden_size=config.vt_hidden_size,
        num_heads=config.vt_num_attention_heads,
        intermediate_size=config.vt_intermediate_size,
        patch_size=config.patch_size,
        init_pos_emb_height=config.init_pos_emb_height,
        init_pos_emb_width=config.init_pos_emb_width,
    )
    text = module.TextConfig(hidden_size=config.text_hidden_size)
    try:
        tower: Any = module.VisionModel(vision)
        projector: Any = import_module(f"{MODULE}.kimi_k25").KimiK25MultiModalProjector(
            module.ModelConfig(text_config=text, vision_config=vision, model_type="kimi_k25")
        )
        named = {name.replace("encoder.", ""): array.astype(dtype) for name, array in tensors.items()}
        sanitized = tower.sanitize(named)
        for model, prefix in ((tower, "vision_tower."), (projector, "mm_projector.")):
            weights = [(name[len(prefix) :], array) for name, array in sanitized.items() if name.startswith(prefix)]
            model.load_weights(weights)
            mx.eval(model.parameters())
    except (ValueError, TypeError, AttributeError) as error:
        raise WeightsError(f"mlx-vlm cannot load the vision tower: {error}", hint="leave --against out") from error

    def encode(pixels: mx.array, grids: Sequence[Grid]) -> mx.array:
        merged = tower(pixels.transpose(0, 2, 3, 1).astype(dtype), grid_thw=mx.array([list(grid) for grid in grids]))
        features = mx.concatenate(projector(merged))
        mx.eval(features)
        return features

    return encode
