"""Write a checkpoint of kimi-mini-vl's training as the shipped model, in the layout of Kimi K2.5 with MLX's 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from scripts.mini import checkpoint
from scripts.mini.export import (
    copy_text_files,
    folder_bytes,
    generation_config,
    model_config,
    special_id,
    write_json,
    write_tensors,
)
from scripts.mini.model import Parameters
from scripts.mini.quantize import quantize
from scripts.mini.tower import is_tower
from scripts.mini.vision_architecture import MAX_PATCHES, PATCH_SIZE, VISION_CONFIG, D
from scripts.mini.vision_training import TEXT_MODEL

SHIPPED = TEXT_MODEL.parent / "kimi-mini-vl"
MAX_BYTES = 6_000_000
"""Limit of the folder's size: it is part of the package."""

PATCH_WEIGHT = "vision_tower.patch_embed.proj.weight"


def vision_model_config(vocab_size: int) -> dict[str, Any]:
    """Return `config.json`, laid out as that of Kimi K2.5."""
    text = model_config(vocab_size)
    quantization = text.pop("quantization")
    text.pop("quantization_config")
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"],
        **ids,
        "ignore_index": -100,
        "media_placeholder_token_id": special_id(vocab_size, "<|media_pad|>"),
        "model_type": "kimi_k25",
        "quantization": quantization,
        "quantization_config": quantization,
        "text_config": text,
        "tie_word_embeddings": False,
        "use_unified_vision_chunk": True,
        "video_placeholder": "<|kimi_k25_video_placeholder|>",
        "vision_config": VISION_CONFIG,
    }


def preprocessor_config() -> dict[str, Any]:
    """Return `preprocessor_config.json`, which reduces pictures to the sizes of the training."""
    return {
        "media_proc_cfg": {
            "in_patch_limit": MAX_PATCHES,
            "in_patch_limit_each_frame": MAX_PATCHES,
            "patch_size": PATCH_SIZE,
            "merge_kernel_size": 2,
            "patch_limit_on_one_side": 512,
            "sample_fps": 2.0,
            "temporal_merge_kernel_size": 4,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
    }


def checkpoint_tensors(parameters: Parameters) -> Parameters:
    """Return the tensors by their published names: the text model in 4 bits, tower and projector in bfloat16."""
    text = {name: value for name, value in parameters.items() if not is_tower(name)}
    tensors = {f"language_model.{name}": value for name, value in quantize(text).items()}
    for name, value in parameters.items():
        if is_tower(name) and not name.startswith("probes."):
            shaped = value.reshape(D, 3, PATCH_SIZE, PATCH_SIZE) if name == PATCH_WEIGHT else value
            tensors[name] = shaped.astype(mx.bfloat16)
    return tensors


def export(run: Path, target: Path = SHIPPED) -> int:
    """Write the model of a run's newest checkpoint, each file atomically; return its bytes on disk."""
    saved = checkpoint.load(run)
    if saved is None:
        raise FileNotFoundError(f"no checkpoint in {run}")
    parameters, _, progress = saved
    target.mkdir(parents=True, exist_ok=True)
    vocab_size = parameters["model.embed_tokens.weight"].shape[0]
    write_tensors(target, checkpoint_tensors(parameters), progress)
    write_json(target, "config.json", vision_model_config(vocab_size))
    write_json(target, "generation_config.json", generation_config(vocab_size))
    write_json(target, "preprocessor_config.json", preprocessor_config())
    copy_text_files(TEXT_MODEL, SHIPPED, target)
    return folder_bytes(target)
