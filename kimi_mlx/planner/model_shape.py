"""A model as the planner sees it: how many values each part has, and how many bytes.

Letters as in `config.json`: a part is a group of matrices that placements treat alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

from kimi_mlx.model.config import ModelConfig, PackedInts, load_config, parse_config

ROUTER_BITS = 16
"""Routers are never quantized."""

SCALE_BITS = 32
"""MLX's affine form: a scale and a bias of 16 bits for each group (of 32 in a float32 checkpoint)."""

BitsOf = Callable[[str], float]
"""Bits a value of the matrix at a path, averaged over the layers that have one."""


@dataclass(frozen=True)
class PartSizes:
    """Bytes, or values, of each part.

    Args:
        embedding: of the tokens.
        head: the projection onto the vocabulary.
        latent: of a layer: the projections onto the latents, which have no heads.
        heads: of a layer: the projections of the heads.
        expansion: of a layer: from the latent to the keys and values of the heads.
        router: of a layer with experts.
        expert: a routed expert.
        shared: of a layer with experts: the shared ones.
        dense: of a layer without experts: its MLP.
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


@dataclass(frozen=True)
class ModelShape:
    """A model's dimensions and sizes.

    Args:
        name: as the user calls it.
        config: its dimensions.
        values: how many values each part has.
        bytes: how many bytes.
        context_tokens: at most.
    """

    name: str
    config: ModelConfig
    values: PartSizes
    bytes: PartSizes
    context_tokens: int

    @property
    def layers(self) -> int:
        """All of them."""
        return self.config.num_hidden_layers

    @property
    def moe_layers(self) -> int:
        """Those with experts."""
        return sum(map(self.config.is_moe_layer, range(self.layers)))

    @property
    def weights_bytes(self) -> float:
        """Of the whole model."""
        return total(self.bytes, self)


def total(parts: PartSizes, shape: ModelShape) -> float:
    """All layers and experts of the parts."""
    moe, dense = shape.moe_layers, shape.layers - shape.moe_layers
    return (
        parts.embedding
        + parts.head
        + shape.layers * (parts.latent + parts.heads + parts.expansion)
        + moe * (parts.router + shape.config.n_routed_experts * parts.expert + parts.shared)
        + dense * parts.dense
    )


def make_shape(name: str, config: ModelConfig, bits_of: BitsOf, context_tokens: int | None = None) -> ModelShape:
    """A shape from dimensions and bits."""
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
            each.name: sum(values * bits_of(path) / 8 for path, values in matrices[each.name])
            for each in fields(PartSizes)
        }
    )


def _matrices(config: ModelConfig) -> dict[str, list[tuple[str, int]]]:
    """Part -> the path of each matrix, with `{}` for the layer, and its number of values."""
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
    }


def shape_of_folder(name: str, folder: Path) -> ModelShape:
    """The shape of a checkpoint in a folder, by its `config.json`.

    Raises:
        ConfigError: no such file, or a model that we do not have.
    """
    return shape_of_config(name, load_config(folder))


def shape_of_config(name: str, config: ModelConfig) -> ModelShape:
    """The shape of a model with this configuration; scales and floats have the size of its `dtype`."""
    return make_shape(name, config, lambda path: _stored_bits(config, path))


def _stored_bits(config: ModelConfig, path: str) -> float:
    """Bits a value in memory; FP8 is decoded to 16-bit floats, packed integers get MLX's biases."""
    floats = 32 if config.dtype == "float32" else 16
    if path.endswith("mlp.gate"):
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
    found = config.quantization_of(path)
    return floats if found is None else found.bits + 2 * floats / found.group_size


@cache
def _known() -> dict[str, Any]:
    return json.loads(resources.files("kimi_mlx.planner").joinpath("models.json").read_text(encoding="utf-8"))


def known_models() -> tuple[str, ...]:
    """Aliases whose dimensions are in `models.json`."""
    return tuple(_known()["models"])


def known_shape(alias: str) -> ModelShape:
    """The shape of a known model; KeyError for an unknown one."""
    facts = _known()["models"][alias]
    return shape_with_bits(
        alias, facts["dimensions"], facts["expert_bits"], facts["rest_bits"], facts["context_tokens"]
    )


def shape_with_bits(
    name: str, dimensions: str, expert_bits: float, rest_bits: float, context_tokens: int | None = None
) -> ModelShape:
    """Dimensions of `models.json` with bits of one's own.

    Args:
        name: what to call it.
        dimensions: their name there.
        expert_bits: bits a value of the routed experts, scales and biases included.
        rest_bits: of all else but the router.
        context_tokens: at most; None for the dimensions' own.
    """
    config = parse_config(_known()["dimensions"][dimensions], where=f"models.json, {dimensions}")

    def bits_of(path: str) -> float:
        if path.endswith("mlp.gate"):
            return ROUTER_BITS
        return expert_bits if ".switch_mlp." in path else rest_bits

    return make_shape(name, config, bits_of, context_tokens)


def with_expert_bits(shape: ModelShape, bits: int, group_size: int = 64) -> ModelShape:
    """The same model with its routed experts quantized to so many bits."""
    expert = shape.values.expert * (bits + SCALE_BITS / group_size) / 8
    return replace(shape, bytes=replace(shape.bytes, expert=expert))
