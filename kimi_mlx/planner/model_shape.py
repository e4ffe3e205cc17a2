"""The size of each part of a model, in values and in bytes.

A part is a group of matrices that every placement treats alike. Field names are those of `config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from statistics import fmean
from typing import Any

from kimi_mlx.model.config import ModelConfig, parse_config
from kimi_mlx.model.config_quantization import PackedInts
from kimi_mlx.model.vision_names import VISION_PATH
from kimi_mlx.sizing.vision import tower_values
from kimi_mlx.weights.presets import Preset

ROUTER_BITS = 32
"""Bits per value of routers in memory: they compute in float32."""

STORED_ROUTER_BITS = 16
"""Bits per value of routers in checkpoints, and in the memory of mlx-lm."""

VISION_BITS = 16
"""Bits per value of vision towers, which conversions do not quantize."""

SCALE_BITS = 32
"""Bits per group in MLX's affine format: a 16-bit scale and a 16-bit bias (32-bit ones in a float32 checkpoint)."""

GROUP_SIZE = 64
"""Default number of values that share a scale and a bias, in conversions too."""

CONVERTED_REST_BITS = 8
"""Bits of all other matrices after `kimi-mlx convert --expert-bits`."""

BitsOf = Callable[[str], float]
"""Return the bits per value of the matrix at a path, averaged over the layers that have it."""


@dataclass(frozen=True)
class PartSizes:
    """Size of each part, in bytes or in values.

    Args:
        embedding: token embedding.
        head: projection to the vocabulary.
        latent: per layer, the projections to the latents, which have no heads.
        heads: per layer, the projections of the heads.
        expansion: per layer, the projections from the latent to the keys and values of the heads.
        router: per MoE layer.
        expert: one routed expert.
        shared: per MoE layer, the shared experts.
        dense: per dense layer, its MLP.
        vision: vision tower and projector; 0 without one.
    """

    embedding: float
    head: float
    latent: float
    heads: float
    expansion: float
    router: float
    expert: float
    shared: float
    dense: float
    vision: float


@dataclass(frozen=True)
class ModelShape:
    """Dimensions and sizes of a model.

    Args:
        name: the user's name for the model.
        config: its dimensions.
        values: number of values in each part.
        bytes: number of bytes in each part.
        context_tokens: largest context.
        expert_group_size: number of values of an expert that share a scale, which conversions keep if it is 32.
    """

    name: str
    config: ModelConfig
    values: PartSizes
    bytes: PartSizes
    context_tokens: int
    expert_group_size: int = GROUP_SIZE

    @property
    def layers(self) -> int:
        """Number of layers."""
        return self.config.num_hidden_layers

    @property
    def moe_layers(self) -> int:
        """Number of layers with experts."""
        return sum(map(self.config.is_moe_layer, range(self.layers)))

    @property
    def weights_bytes(self) -> float:
        """Size of the whole model."""
        return total(self.bytes, self)


def total(parts: PartSizes, shape: ModelShape) -> float:
    """Return the sum over all layers and experts."""
    moe, dense = shape.moe_layers, shape.layers - shape.moe_layers
    return (
        parts.embedding
        + parts.head
        + parts.vision
        + shape.layers * (parts.latent + parts.heads + parts.expansion)
        + moe * (parts.router + shape.config.n_routed_experts * parts.expert + parts.shared)
        + dense * parts.dense
    )


def make_shape(name: str, config: ModelConfig, bits_of: BitsOf, context_tokens: int | None = None) -> ModelShape:
    """Return the shape for the given dimensions and bits."""
    return ModelShape(
        name,
        config,
        _parts(config, lambda path: 8),
        _parts(config, bits_of),
        context_tokens or config.max_position_embeddings,
    )


def _parts(config: ModelConfig, bits_of: BitsOf) -> PartSizes:
    matrices = _matrices(config)
    return PartSizes(
        **{
            field.name: sum(values * bits_of(path) / 8 for path, values in matrices[field.name])
            for field in fields(PartSizes)
        }
    )


def _matrices(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Map each part to its matrices: (path with `{}` for the layer, number of values)."""
    width, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    q_rank, q_width = config.q_lora_rank, heads * config.qk_head_dim
    q_a = [] if q_rank is None else [("q_a_proj", width * q_rank)]
    q_b = ("q_proj", width * q_width) if q_rank is None else ("q_b_proj", q_rank * q_width)
    attention = {
        "latent": [*q_a, ("kv_a_proj_with_mqa", width * (latent + config.qk_rope_head_dim))],
        "heads": [q_b, ("o_proj", heads * config.v_head_dim * width)],
        "expansion": [
            ("embed_q", heads * latent * config.qk_nope_head_dim),
            ("unembed_out", heads * latent * config.v_head_dim),
        ],
    }
    expert = width * config.moe_intermediate_size
    mlps = {
        "expert": ("switch_mlp.", expert),
        "shared": ("shared_experts.", expert * config.n_shared_experts),
        "dense": ("", width * config.intermediate_size),
    }
    return {
        "embedding": [("model.embed_tokens", config.vocab_size * width)],
        "head": [("lm_head", config.vocab_size * width)],
        **{
            part: [(f"model.layers.{{}}.self_attn.{path}", values) for path, values in matrices]
            for part, matrices in attention.items()
        },
        "router": [("model.layers.{}.mlp.gate", width * config.n_routed_experts)],
        **{
            part: [
                (f"model.layers.{{}}.mlp.{path}{matrix}", values) for matrix in ("gate_proj", "up_proj", "down_proj")
            ]
            for part, (path, values) in mlps.items()
        },
        "vision": [] if config.vision is None else [(VISION_PATH, tower_values(config.vision))],
    }


def shape_of_config(name: str, config: ModelConfig) -> ModelShape:
    """Return the shape of a model with this configuration. Scales and floats have the size of its `dtype`."""
    shape = make_shape(name, config, lambda path: _stored_bits(config, path))
    return replace(shape, expert_group_size=_expert_group_size(config))


def _expert_group_size(config: ModelConfig) -> int:
    if isinstance(config.compression, PackedInts):
        return config.compression.group_size
    moe_layer = next((layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)), 0)
    quantization = config.quantization_of(f"model.layers.{moe_layer}.mlp.switch_mlp.gate_proj")
    return GROUP_SIZE if quantization is None else quantization.group_size


def _stored_bits(config: ModelConfig, path: str) -> float:
    """Return the bits per value in memory. FP8 is decoded to 16-bit floats, and packed integers get MLX's biases."""
    floats = 32 if config.dtype == "float32" else 16
    if path.endswith("mlp.gate"):
        return ROUTER_BITS
    if path == VISION_PATH:
        return floats
    if isinstance(config.compression, PackedInts) and ".switch_mlp." in path:
        return config.compression.bits + SCALE_BITS / config.compression.group_size
    if "{}" not in path:
        return _quantized_bits(config, path, floats)
    is_moe = ".switch_mlp." in path or ".shared_experts." in path
    layers = [
        layer
        for layer in range(config.num_hidden_layers)
        if ".self_attn." in path or config.is_moe_layer(layer) == is_moe
    ]
    return fmean(_quantized_bits(config, path.format(layer), floats) for layer in layers) if layers else floats


def _quantized_bits(config: ModelConfig, path: str, floats: int) -> float:
    quantization = config.quantization_of(path)
    if quantization is None:
        return floats
    scale_bits = 2 * floats if quantization.mode == "affine" else 8
    return quantization.bits + scale_bits / quantization.group_size


@cache
def _models_file() -> dict[str, Any]:
    return json.loads(resources.files("kimi_mlx.planner").joinpath("models.json").read_text(encoding="utf-8"))


def known_models() -> tuple[str, ...]:
    """Return the aliases whose dimensions are in `models.json`."""
    return tuple(_models_file()["models"])


def known_config(alias: str) -> ModelConfig:
    """Return the dimensions of a known model. Raises KeyError for an unknown one."""
    name = _models_file()["models"][alias]["dimensions"]
    return parse_config(_models_file()["dimensions"][name], where=f"models.json, {name}")


def known_shape(alias: str) -> ModelShape:
    """Return the shape of a known model. Raises KeyError for an unknown one."""
    facts = _models_file()["models"][alias]
    shape = shape_with_bits(
        alias, facts["dimensions"], facts["expert_bits"], facts["rest_bits"], facts["context_tokens"]
    )
    return replace(shape, expert_group_size=facts.get("expert_group_size", GROUP_SIZE))


def shape_with_bits(
    name: str,
    dimensions: str,
    expert_bits: float,
    rest_bits: float,
    context_tokens: int | None = None,
    router_bits: float = ROUTER_BITS,
) -> ModelShape:
    """Return the shape of a model with dimensions from `models.json` and the given bits.

    Args:
        name: name for the model.
        dimensions: name of the dimensions in `models.json`.
        expert_bits: bits per value of routed experts, including scales and biases.
        rest_bits: bits per value of everything else except routers.
        context_tokens: largest context; None for the one in the dimensions.
        router_bits: bits per value of routers.
    """
    config = parse_config(_models_file()["dimensions"][dimensions], where=f"models.json, {dimensions}")

    def bits_of(path: str) -> float:
        if path.endswith("mlp.gate"):
            return router_bits
        if path == VISION_PATH:
            return VISION_BITS
        return expert_bits if ".switch_mlp." in path else rest_bits

    return make_shape(name, config, bits_of, context_tokens)


def with_expert_bits(shape: ModelShape, bits: int) -> ModelShape:
    """Return the model that `kimi-mlx convert --expert-bits` makes: all other matrices but routers get 8 bits."""
    group_size = shape.expert_group_size if shape.expert_group_size == 32 else GROUP_SIZE
    scale_bits = SCALE_BITS * (2 if shape.config.dtype == "float32" else 1) / group_size

    def bits_of(path: str) -> float:
        if path.endswith("mlp.gate") or path == VISION_PATH:
            return _stored_bits(shape.config, path)
        return (bits if ".switch_mlp." in path else CONVERTED_REST_BITS) + scale_bits

    return replace(make_shape(shape.name, shape.config, bits_of, shape.context_tokens), expert_group_size=group_size)


def with_preset(shape: ModelShape, preset: Preset) -> ModelShape:
    """Return the model that `kimi-mlx convert --preset` makes. Experts of all layers count with their mean size."""
    scale_bits = SCALE_BITS * (2 if shape.config.dtype == "float32" else 1)
    ends = min(2, shape.moe_layers) / max(shape.moe_layers, 1)

    def bits_of(path: str) -> float:
        if path.endswith("mlp.gate") or path == VISION_PATH:
            return _stored_bits(shape.config, path)
        if ".switch_mlp." not in path:
            return preset.rest.bits + scale_bits / preset.rest.group_size
        inner, end = (preset.expert_format(path.endswith("down_proj"), is_end).bits for is_end in (False, True))
        return (1 - ends) * inner + ends * end + scale_bits / preset.experts.group_size

    group_size = preset.experts.group_size
    return replace(make_shape(shape.name, shape.config, bits_of, shape.context_tokens), expert_group_size=group_size)
