"""Build a vision tower from the tensors of tests/checkpoints.py, without files."""

from __future__ import annotations

import mlx.core as mx

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.names import CheckpointLayout, SourceMatrix
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.vision import VisionTower
from kimi_mlx.model.vision_config import VisionConfig, parse_vision
from kimi_mlx.model.vision_names import vision_entries
from kimi_mlx.model.weight import Weight
from tests.checkpoints import Config, tensor_values, vision_shapes

PLACEHOLDER = 187
"""Token id of an image's placeholders."""


def vision_config(raw: Config) -> VisionConfig:
    """Parse a `vision_config`."""
    outer = {"model_type": "kimi_k25", "media_placeholder_token_id": PLACEHOLDER, "vision_config": raw}
    config = parse_vision(outer, raw["text_hidden_size"], "config.json")
    assert config is not None
    return config


def vision_weights(raw: Config, seed: int, dtype: mx.Dtype = mx.float32) -> dict[str, Weight]:
    """Return the entries of a random tower, floats."""
    tensors = {name: tensor_values(name, shape, seed) for name, shape in vision_shapes(raw).items()}
    layout = CheckpointLayout(has=lambda name: name in tensors, quantization=lambda path: None)
    entries: dict[str, Weight] = {}
    for entry in vision_entries(vision_config(raw), layout):
        source = _source_of(entry.parts)
        values = tensors.pop(source.paths[0] + source.suffix)
        entries[entry.name] = Weight(mx.array(values).reshape(source.shape).astype(dtype), dtype=dtype)
    assert not tensors
    return entries


def quantize(weights: dict[str, Weight], bits: int, group_size: int, mode: str = "affine") -> dict[str, Weight]:
    """Quantize the matrices whose columns are whole groups, except for those that are always floats."""
    quantization = Quantization(bits, group_size, mode)
    result = dict(weights)
    for name, weight in weights.items():
        matrix = weight.weight
        if matrix.ndim == 2 and matrix.shape[1] % group_size == 0 and "patch_embed" not in name:
            parts = mx.quantize(matrix, **quantization.arguments)
            result[name] = Weight(*parts, quantization=quantization, dtype=weight.dtype)
    return result


def dequantize(weights: dict[str, Weight]) -> dict[str, Weight]:
    """Return float weights with the values of quantized ones."""
    result = dict(weights)
    for name, weight in weights.items():
        if weight.quantization is not None:
            assert weight.scales is not None
            arguments = weight.quantization.arguments
            values = mx.dequantize(weight.weight, weight.scales, weight.biases, dtype=weight.dtype, **arguments)
            result[name] = Weight(values, dtype=weight.dtype)
    return result


def vision_tower(raw: Config, weights: dict[str, Weight]) -> VisionTower:
    """Build the tower."""
    return VisionTower(vision_config(raw), LayerWeights({name: [weight] for name, weight in weights.items()}))


def _source_of(parts: tuple[tuple[SourceMatrix, ...], ...]) -> SourceMatrix:
    ((source,),) = parts
    return source
