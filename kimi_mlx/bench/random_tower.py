"""Vision towers with random weights, in the names and shapes of published checkpoints."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from kimi_mlx.model.names import CheckpointLayout
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.vision import VisionTower
from kimi_mlx.model.vision_config import CHANNELS, VisionConfig
from kimi_mlx.model.vision_names import vision_entries
from kimi_mlx.model.weight import Weight

Tensors = dict[str, mx.array]


def random_tower(config: VisionConfig, seed: int) -> Tensors:
    """Return all tensors of a tower and its projector: norms are 1, biases 0, matrices have variance 1 / columns."""
    random = np.random.default_rng(seed)
    hidden, inner, merged = config.vt_hidden_size, config.vt_intermediate_size, config.merged_size
    matrices = {
        "vision_tower.patch_embed.proj": (hidden, CHANNELS, config.patch_size, config.patch_size),
        "mm_projector.proj.0": (merged, merged),
        "mm_projector.proj.2": (config.text_hidden_size, merged),
    }
    norms = ["vision_tower.encoder.final_layernorm", "mm_projector.pre_norm"]
    for block in range(config.vt_num_hidden_layers):
        path = f"vision_tower.encoder.blocks.{block}"
        norms += [f"{path}.norm0", f"{path}.norm1"]
        matrices |= {
            f"{path}.wqkv": (3 * hidden, hidden),
            f"{path}.wo": (hidden, hidden),
            f"{path}.mlp.fc0": (inner, hidden),
            f"{path}.mlp.fc1": (hidden, inner),
        }
    table = (config.init_pos_emb_height, config.init_pos_emb_width, hidden)
    tensors = {"vision_tower.patch_embed.pos_emb.weight": _normal(random, table, 0.02)}
    for path, shape in matrices.items():
        tensors[f"{path}.weight"] = _normal(random, shape, math.prod(shape[1:]) ** -0.5)
        tensors[f"{path}.bias"] = mx.zeros(shape[:1])
    for path in norms:
        tensors |= {f"{path}.weight": mx.ones((hidden,)), f"{path}.bias": mx.zeros((hidden,))}
    return tensors


def build_tower(config: VisionConfig, tensors: Tensors, dtype: mx.Dtype) -> VisionTower:
    """Return kimi-mlx's tower with these weights."""
    layout = CheckpointLayout(has=lambda name: name in tensors, quantization=lambda path: None)
    weights: dict[str, list[Weight]] = {}
    for entry in vision_entries(config, layout):
        ((source,),) = entry.parts
        values = tensors[source.paths[0] + source.suffix].reshape(source.shape)
        weights[entry.name] = [Weight(values.astype(dtype), dtype=dtype)]
    return VisionTower(config, LayerWeights(weights))


def _normal(random: np.random.Generator, shape: tuple[int, ...], deviation: float) -> mx.array:
    return mx.array(random.standard_normal(shape, np.float32) * np.float32(deviation))
