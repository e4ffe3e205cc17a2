"""Small draft models of the published shape, with reproducible random weights.

`draft_config` returns a `config.json` for a model, `write_draft` writes a folder as published on the hub, and
`quantize_draft` its MLX affine form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from tests.checkpoints import Config, Shapes, attention_shapes, mlp_shapes, store, tensor_values, write_shards

TABLES = ("d2t", "t2d")
"""Tensors of a reduced vocabulary, which are never quantized."""


PUBLISHED: Config = {
    "architectures": ["Eagle3DeepseekV2ForCausalLM"],
    "draft_vocab_size": 163840,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 30, 58], "use_aux_hidden_state": True},
    "fc_norm": True,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 262144,
    "norm_output": True,
    "num_attention_heads": 64,
    "num_hidden_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "v_head_dim": 128,
    "vocab_size": 163840,
}
"""Dimensions of the draft models that are published for K2.5 to K2.7."""


def draft_config(target: Config, **fields: object) -> Config:
    """Return the config of an EAGLE-3.1 draft model with its own widths, for a model with the config `target`.

    Args:
        target: the model's `config.json`, of the text model.
        fields: other values of some fields; None removes a field.
    """
    config = {
        "architectures": ["Eagle3DeepseekV2ForCausalLM"],
        "attention_bias": False,
        "draft_vocab_size": target["vocab_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2, 3], "use_aux_hidden_state": True},
        "fc_norm": True,
        "hidden_act": "silu",
        "hidden_size": target["hidden_size"],
        "intermediate_size": 160,
        "kv_lora_rank": 64,
        "max_position_embeddings": target["max_position_embeddings"],
        "model_type": "kimi_k2",
        "norm_output": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "q_lora_rank": 96,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-5,
        "rope_scaling": target.get("rope_scaling"),
        "rope_theta": target["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "v_head_dim": 32,
        "vocab_size": target["vocab_size"],
        **fields,
    }
    return {name: value for name, value in config.items() if value is not None}


def draft_shapes(config: Config, layer: str = "midlayer.", prefix: str = "", has_embedding: bool = False) -> Shapes:
    """Return the shape of each tensor by name, without those of TABLES.

    Args:
        config: config of the draft model.
        layer: beginning of the names of the layer.
        prefix: beginning of the other names, but that of the head.
        has_embedding: whether the file has an embedding of its own.
    """
    hidden, target = config["hidden_size"], config.get("target_hidden_size", config["hidden_size"])
    num_captured = len(config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", [2, 30, 58]))
    attention = attention_shapes(config, input_size=2 * hidden)
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes: Shapes = {
        f"{prefix}fc.weight": (hidden, num_captured * target),
        f"{prefix}norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
        **{f"{layer}{name}.weight": (hidden,) for name in norms},
        **{layer + name: shape for name, shape in attention.items()},
        **{layer + name: shape for name, shape in mlp_shapes("mlp", hidden, config["intermediate_size"]).items()},
    }
    if config.get("fc_norm"):
        shapes |= {f"{prefix}fc_norm.{i}.weight": (target,) for i in range(num_captured)}
    if has_embedding:
        shapes[f"{prefix}embed_tokens.weight"] = (config["vocab_size"], hidden)
    return shapes


def drafted_tokens(config: Config) -> np.ndarray:
    """Return the tokens of a reduced vocabulary, ascending: draft_vocab_size of them, spread over the whole."""
    return np.linspace(0, config["vocab_size"] - 1, config["draft_vocab_size"]).astype(np.int64)


def draft_tensors(
    config: Config, seed: int, layer: str = "midlayer.", prefix: str = "", has_embedding: bool = False
) -> dict[str, np.ndarray]:
    """Return all tensors in float32, with those of TABLES if the vocabulary is reduced; see draft_shapes.

    Values depend on the seed and the canonical name, so all layouts have the same.
    """
    tensors = {
        name: tensor_values(name.removeprefix(layer).removeprefix(prefix), shape, seed)
        for name, shape in draft_shapes(config, layer, prefix, has_embedding).items()
    }
    if config["draft_vocab_size"] < config["vocab_size"]:
        tokens = drafted_tokens(config)
        tensors["d2t"] = tokens - np.arange(len(tokens))
        tensors["t2d"] = np.isin(np.arange(config["vocab_size"]), tokens)
    return tensors


def write_draft(
    folder: Path,
    config: Config,
    seed: int = 1,
    dtype: str = "float32",
    layer: str = "midlayer.",
    prefix: str = "",
    has_embedding: bool = False,
    num_shards: int = 1,
) -> Path:
    """Write a draft model as published on the hub; return the folder.

    Args:
        folder: target; created if missing.
        config: fields of `config.json`, from draft_config.
        seed: random seed of the weights.
        dtype: dtype of the floats.
        layer: see draft_shapes.
        prefix: see draft_shapes.
        has_embedding: see draft_shapes.
        num_shards: number of files; with one there is no index.
    """
    tensors = {
        name: mx.array(value) if name in TABLES else store(name, value, dtype)
        for name, value in draft_tensors(config, seed, layer, prefix, has_embedding).items()
    }
    write_shards(folder, {**config, "torch_dtype": dtype}, tensors, num_shards)
    return folder


def quantize_draft(src: Path, dst: Path, bits: int, group_size: int, floats: Sequence[str] = ()) -> Path:
    """Write the MLX affine form of a draft model in one file; return `dst`.

    Args:
        src: folder written by write_draft with one file.
        dst: target.
        bits: bits of all matrices.
        group_size: size of a quantization group.
        floats: paths of matrices that stay as they are.
    """
    tensors = mx.load(str(src / "model.safetensors"))
    assert isinstance(tensors, dict)
    stored: dict[str, mx.array] = {}
    for name, value in tensors.items():
        path = name.removesuffix(".weight")
        if value.ndim < 2 or path in floats:
            stored[name] = value
        else:
            parts = mx.quantize(value, group_size=group_size, bits=bits)
            names = (f"{path}.{part}" for part in ("weight", "scales", "biases"))
            stored |= dict(zip(names, parts, strict=True))
    block = {"group_size": group_size, "bits": bits, "mode": "affine", **dict.fromkeys(floats, False)}
    config = json.loads((src / "config.json").read_text())
    write_shards(dst, {**config, "quantization": block, "quantization_config": block}, stored, 1)
    return dst
