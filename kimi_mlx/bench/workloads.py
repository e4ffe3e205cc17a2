"""Workloads: synthetic checkpoints of K2's shape with random weights, and random prompts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.bench.random_tower import random_tower
from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.folders import cache_folder
from kimi_mlx.model.vision_config import parse_vision

Config = dict[str, Any]
Tensors = dict[str, mx.array]

BITS = 4
GROUP_SIZE = 64
CENTRE = (2**BITS - 1) / 2
"""Mean of random codes 0 to 15; a bias of -CENTRE * scale makes the mean of the weights 0."""

CODE_DEVIATION = ((2 ** (2 * BITS) - 1) / 12) ** 0.5
"""Standard deviation of random codes."""

SEED = 20260101
FORMAT = 1
"""Version of the random weights; increased when they change, so that old folders are no longer used."""

COMMON: Config = {
    "model_type": "kimi_k2",
    "vocab_size": 8192,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
    "quantization": {"bits": BITS, "group_size": GROUP_SIZE, "mode": "affine"},
}

WIDE: Config = {
    "num_hidden_layers": 8,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "moe_intermediate_size": 512,
    "n_routed_experts": 32,
    "num_experts_per_tok": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

SHAPES: Mapping[str, Config] = {
    # few wide layers: reading weights takes most of the time
    "wide": WIDE,
    # as many layers as K2, all small: dispatch and collectives take most of the time
    "deep": {
        "num_hidden_layers": 61,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
    # K2.5's vision tower at full width with 3 of its 27 blocks, and few text layers
    "vision": {
        **WIDE,
        "num_hidden_layers": 2,
        "vision_config": {
            "vt_hidden_size": 1152,
            "vt_intermediate_size": 4304,
            "vt_num_attention_heads": 16,
            "vt_num_hidden_layers": 3,
            "init_pos_emb_height": 64,
            "init_pos_emb_width": 64,
            "init_pos_emb_time": 4,
            "text_hidden_size": WIDE["hidden_size"],
        },
    },
}

TEXT_SHAPES = tuple(name for name, shape in SHAPES.items() if "vision_config" not in shape)
"""Shapes without a vision tower."""


def synthetic_config(shape: str, **changes: Any) -> Config:
    """Return the `config.json` of a shape in SHAPES; `changes` replace fields."""
    text = {**COMMON, **SHAPES[shape], **changes}
    vision = text.pop("vision_config", None)
    if vision is None:
        return text
    return {
        "model_type": "kimi_k25",
        "media_placeholder_token_id": text["vocab_size"] - 1,
        "quantization": text.pop("quantization"),
        "torch_dtype": text["torch_dtype"],
        "text_config": text,
        "vision_config": vision,
    }


def synthetic_checkpoint(shape: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Return the folder of a synthetic checkpoint in the user's cache; created once.

    They take 230 MB (wide), 70 MB (deep) and 230 MB (vision).

    Args:
        shape: key of SHAPES.
        progress: callback with the number of written layers and of all layers.

    Raises:
        UsageError: unknown shape.
        WeightsError: the folder cannot be written.
    """
    if shape not in SHAPES:
        raise UsageError(f"unknown synthetic checkpoint `{shape}`", hint=f"use one of {', '.join(SHAPES)}")
    caches = require_cache_folder()
    config = synthetic_config(shape)
    digest = hashlib.sha256(json.dumps([FORMAT, SEED, config], sort_keys=True).encode()).hexdigest()
    folder = caches / "synthetic" / f"{shape}-{digest[:8]}"
    if not (folder / "config.json").is_file():
        try:
            _make(folder, config, progress)
        except (OSError, RuntimeError) as error:  # MLX raises RuntimeError if it cannot write
            raise synthetic_error(folder, error) from error
    return folder


def synthetic_error(folder: Path, error: Exception) -> WeightsError:
    """Return the error that a synthetic checkpoint cannot be written."""
    return WeightsError(
        f"the synthetic checkpoint `{folder}` cannot be written: {error}",
        hint="free some space, or set XDG_CACHE_HOME to another folder",
    )


def require_cache_folder() -> Path:
    """Return the user's cache folder. Raises WeightsError for a user without a home folder."""
    folder = cache_folder()
    if folder is None:
        raise WeightsError("no home folder to store the checkpoint in", hint="set XDG_CACHE_HOME")
    return folder


def _make(folder: Path, config: Config, progress: Callable[[int, int], None]) -> None:
    """Write to a temporary folder and rename it, so that `folder` is always complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part"))
    try:
        write_synthetic(part, config, progress)
        try:
            os.replace(part, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_synthetic(
    folder: Path,
    config: Config,
    progress: Callable[[int, int], None] = lambda done, total: None,
    change: Callable[[Tensors], Tensors] = lambda tensors: tensors,
) -> None:
    """Write a checkpoint with random weights in MLX's affine layout, one file and one layer at a time.

    Args:
        folder: folder to write.
        config: its `config.json`.
        progress: callback with the number of written files and of all files.
        change: function that returns the tensors of each file as they are to be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = config.get("text_config", config)["num_hidden_layers"] + 1 + ("vision_config" in config)
    size = 0
    for number, tensors in enumerate(map(change, _files(config)), start=1):
        file = f"model-{number:05}-of-{total:05}.safetensors"
        mx.save_safetensors(str(folder / file), tensors, {"format": "mlx"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
        progress(number, total)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _files(config: Config) -> Iterator[Tensors]:
    """Yield the tensors of each file: embedding, last norm and head, then the layers, then a vision tower."""
    if "vision_config" not in config:
        yield from _text_files(config)
        return
    for tensors in _text_files(config["text_config"]):
        yield {f"language_model.{name}": array for name, array in tensors.items()}
    vision = parse_vision(config, config["text_config"]["hidden_size"], "config.json")
    assert vision is not None
    yield {name: array.astype(mx.bfloat16) for name, array in random_tower(vision, SEED).items()}


def _text_files(config: Config) -> Iterator[Tensors]:
    random = np.random.default_rng(SEED)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield {
        **_matrix(random, "model.embed_tokens", vocabulary, hidden),
        "model.norm.weight": mx.ones((hidden,), mx.bfloat16),
        **_matrix(random, "lm_head", vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        yield _layer(random, config, layer)


def _layer(random: np.random.Generator, config: Config, layer: int) -> Tensors:
    """Return one layer, with mlx-lm's tensor names."""
    prefix, hidden = f"model.layers.{layer}", config["hidden_size"]
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    attention = f"{prefix}.self_attn"
    norms = {
        f"{prefix}.input_layernorm": hidden,
        f"{prefix}.post_attention_layernorm": hidden,
        f"{attention}.q_a_layernorm": config["q_lora_rank"],
        f"{attention}.kv_a_layernorm": latent,
    }
    return {
        **{f"{name}.weight": mx.ones((size,), mx.bfloat16) for name, size in norms.items()},
        **_matrix(random, f"{attention}.q_a_proj", config["q_lora_rank"], hidden),
        **_matrix(random, f"{attention}.q_b_proj", heads * (nope + rope), config["q_lora_rank"]),
        **_matrix(random, f"{attention}.kv_a_proj_with_mqa", latent + rope, hidden),
        **_matrix(random, f"{attention}.embed_q", heads, latent, nope),
        **_matrix(random, f"{attention}.unembed_out", heads, value, latent),
        **_matrix(random, f"{attention}.o_proj", hidden, heads * value),
        **_mlp(random, config, layer, f"{prefix}.mlp"),
    }


def _mlp(random: np.random.Generator, config: Config, layer: int, path: str) -> Tensors:
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    experts = config["n_routed_experts"]
    if layer < config["first_k_dense_replace"]:
        return _swiglu(random, path, hidden, config["intermediate_size"])
    bias = random.uniform(-0.1, 0.1, experts).astype(np.float32)
    router = random.standard_normal((experts, hidden), np.float32) * hidden**-0.5
    return {
        f"{path}.gate.weight": mx.array(router).astype(mx.bfloat16),
        f"{path}.gate.e_score_correction_bias": mx.array(bias),
        **_swiglu(random, f"{path}.switch_mlp", hidden, width, experts),
        **_swiglu(random, f"{path}.shared_experts", hidden, width * config["n_shared_experts"]),
    }


def _swiglu(random: np.random.Generator, path: str, hidden: int, width: int, *stack: int) -> Tensors:
    return {
        **_matrix(random, f"{path}.gate_proj", *stack, width, hidden),
        **_matrix(random, f"{path}.up_proj", *stack, width, hidden),
        **_matrix(random, f"{path}.down_proj", *stack, hidden, width),
    }


def _matrix(random: np.random.Generator, path: str, *shape: int) -> Tensors:
    """Return a quantized matrix (..., rows, columns) with mean 0 and variance 1 / columns."""
    *leading, columns = shape
    codes = random.integers(0, 2**32, (*leading, columns * BITS // 32), np.uint32)
    spread = random.uniform(0.8, 1.2, (*leading, columns // GROUP_SIZE)).astype(np.float32)
    scales = mx.array(spread / (CODE_DEVIATION * columns**0.5)).astype(mx.bfloat16)
    return {
        f"{path}.weight": mx.array(codes),
        f"{path}.scales": scales,
        f"{path}.biases": (scales.astype(mx.float32) * -CENTRE).astype(mx.bfloat16),
    }


def random_prompt(vocab_size: int, length: int, repetition: int, seed: int = 0, number: int = 0) -> tuple[int, ...]:
    """Return random token ids, which depend only on the arguments."""
    random = np.random.default_rng([seed, length, repetition, number])
    return tuple(int(id) for id in random.integers(0, vocab_size, length))
