"""The vision tower: features of images against the CPU in float32, and both forms of its attention.

Letters: H heads, P patches of an image, Q size of a head.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.checks import Sizes
from kimi_mlx.gpu_check.context import Context
from kimi_mlx.model.device import device_kind
from kimi_mlx.model.device_traits import has_fused_attention
from kimi_mlx.model.names import CheckpointLayout
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.vision import VisionTower
from kimi_mlx.model.vision_attention import blockwise, fused
from kimi_mlx.model.vision_config import CHANNELS, Grid, VisionConfig
from kimi_mlx.model.vision_names import vision_entries
from kimi_mlx.model.weight import Weight

NUM_LAYERS = 2

HEADS = 4
HEAD_DIM = 72
"""K2.5's. MLX has a kernel of this width for more than 8 queries only."""

QUERY_BLOCK = 100
"""Not a multiple of the kernels' block sizes."""

FEATURE_LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.1}
ATTENTION_LIMITS = {mx.float32: 2e-3, mx.bfloat16: 0.05}
"""Largest relative errors of a row. The CPU reaches 0.009 and 0.010 in bfloat16."""


def check(context: Context) -> None:
    """Compare attention and features, and time the encoding of an image."""
    for patches in context.sizes.image_patches:
        context.progress(f"attention of {patches} patches")
        _compare_attention(context, patches)
    config = _config(context.sizes)
    weights = _random_weights(config)
    grids = context.sizes.images
    pixels = _random_pixels(config, grids)
    context.progress(f"images of {grids} patches on the CPU")
    expected = _tower(config, weights, mx.float32)(pixels, grids)
    for dtype in context.dtypes:
        short = str(dtype).removeprefix("mlx.core.")
        context.progress(f"images of {grids} patches in {short}")
        with context.on_device():
            tower = _tower(config, weights, dtype)
            actual = tower(pixels, grids)
        context.compare(f"features {short}", actual, expected, FEATURE_LIMITS[dtype])
        _time(context, tower, short)


def _compare_attention(context: Context, patches: int) -> None:
    shape = (1, HEADS, patches, HEAD_DIM)
    inputs = [mx.random.normal(shape, key=mx.random.key(seed)).astype(mx.bfloat16) for seed in range(3)]
    q, k, v = (x.astype(mx.float32) for x in inputs)
    expected = blockwise(q, k, v, QUERY_BLOCK)
    mx.eval(expected)
    for dtype, limit in ATTENTION_LIMITS.items():
        q, k, v = (x.astype(dtype) for x in inputs)
        with context.on_device():
            outputs = {"blockwise": blockwise(q, k, v, QUERY_BLOCK)}
            kind = device_kind()
            if kind == "cpu" or has_fused_attention(kind, dtype.size, HEAD_DIM, HEAD_DIM, patches):
                outputs["fused"] = fused(q, k, v)
            mx.eval(outputs)
        for form, actual in outputs.items():
            name = f"attention P={patches} {str(dtype).removeprefix('mlx.core.')} {form}"
            context.compare(name, actual, expected, limit)


def _time(context: Context, tower: VisionTower, dtype: str) -> None:
    """Measure a block of the tower, with the embedding and the projector shared among the blocks."""
    grid = context.sizes.timed_image
    pixels = _random_pixels(tower.config, (grid,))
    with context.on_device():
        seconds = context.median_s(lambda: tower(pixels, [grid]), repeats=3)
    name = f"{grid[1]} x {grid[2]} patches, {dtype}"
    context.measure("vision tower, per block", name, 1e3 * seconds / NUM_LAYERS, "ms")


def _config(sizes: Sizes) -> VisionConfig:
    """Return K2.5's tower with fewer blocks, or a small one with heads of the same width."""
    heads, inner, text = (16, 4304, 7168) if sizes.has_k2_widths else (2, 176, 128)
    table = 64 if sizes.has_k2_widths else 16
    return VisionConfig(
        vt_hidden_size=heads * HEAD_DIM,
        vt_intermediate_size=inner,
        vt_num_attention_heads=heads,
        vt_num_hidden_layers=NUM_LAYERS,
        init_pos_emb_height=table,
        init_pos_emb_width=table,
        init_pos_emb_time=4,
        text_hidden_size=text,
        media_placeholder_token_id=0,
    )


def _random_weights(config: VisionConfig) -> dict[str, mx.array]:
    """Return the entries of a random tower, with the values of a bfloat16 checkpoint."""
    random = np.random.default_rng(0)
    layout = CheckpointLayout(has=lambda name: False, quantization=lambda path: None)
    weights: dict[str, mx.array] = {}
    for entry in vision_entries(config, layout):
        ((source,),) = entry.parts
        values = mx.array(random.standard_normal(source.shape, np.float32))
        if entry.name.endswith(("bias", "pos_emb")):
            values = 0.1 * values
        else:
            values = 1 + 0.1 * values if len(source.shape) == 1 else values * source.shape[-1] ** -0.5
        weights[entry.name] = values.astype(mx.bfloat16)
    mx.eval(weights)
    return weights


def _tower(config: VisionConfig, weights: dict[str, mx.array], dtype: mx.Dtype) -> VisionTower:
    entries = {name: [Weight(array.astype(dtype), dtype=dtype)] for name, array in weights.items()}
    return VisionTower(config, LayerWeights(entries))


def _random_pixels(config: VisionConfig, grids: tuple[Grid, ...]) -> mx.array:
    patches = sum(frames * rows * columns for frames, rows, columns in grids)
    shape = (patches, CHANNELS, config.patch_size, config.patch_size)
    return mx.array(np.random.default_rng(1).integers(0, 256, shape, np.uint8))
