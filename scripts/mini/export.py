"""Write a training checkpoint as the shipped model: quantized weights and the configuration files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.runtime.chat_tokenizer import MAX_TOKENS_KEY
from scripts.mini import checkpoint
from scripts.mini.architecture import CONFIG
from scripts.mini.quantize import BITS, GROUP_SIZE, quantize
from scripts.mini.vocabulary import SPECIAL_IDS, SPECIAL_TOKENS

SHIPPED = Path(__file__).resolve().parents[2] / "kimi_mlx" / "models" / "kimi-mini"
MAX_ANSWER_TOKENS = 512
"""Default limit of an answer, about twice the longest one in training: the toy may repeat itself without end."""

VOCABULARY_FILES = ("tiktoken.model", "tokenizer_config.json")


def special_id(vocab_size: int, token: str) -> int:
    """Return the id of a special token."""
    offset = next(offset for offset, content in SPECIAL_TOKENS.items() if content == token)
    return vocab_size - SPECIAL_IDS + offset


def model_config(vocab_size: int) -> dict[str, Any]:
    """Return `config.json`."""
    ids = {f"{key}_token_id": special_id(vocab_size, f"[{key.upper()}]") for key in ("bos", "eos", "pad")}
    quantization = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}
    return (
        CONFIG
        | ids
        | {
            "vocab_size": vocab_size,
            "torch_dtype": "float32",
            "quantization": quantization,
            "quantization_config": quantization,
        }
    )


def generation_config(vocab_size: int) -> dict[str, Any]:
    """Return `generation_config.json`: an answer ends at `<|im_end|>`; no sampling."""
    return {
        "bos_token_id": special_id(vocab_size, "[BOS]"),
        "eos_token_id": special_id(vocab_size, "<|im_end|>"),
        "pad_token_id": special_id(vocab_size, "[PAD]"),
        "do_sample": False,
        "temperature": 0.0,
        MAX_TOKENS_KEY: MAX_ANSWER_TOKENS,
    }


def export(run: Path, vocabulary: Path, target: Path = SHIPPED) -> int:
    """Write the model of a run's newest checkpoint, each file atomically; return its bytes on disk."""
    saved = checkpoint.load(run)
    if saved is None:
        raise FileNotFoundError(f"no checkpoint in {run}")
    parameters, _, progress = saved
    target.mkdir(parents=True, exist_ok=True)
    vocab_size = parameters["model.embed_tokens.weight"].shape[0]
    part = target / ".part.safetensors"
    metadata = {"format": "mlx", "step": str(progress["step"]), "tokens": str(progress["tokens"])}
    mx.save_safetensors(str(part), quantize(parameters), metadata)
    os.replace(part, target / "model.safetensors")
    for name, content in (
        ("config.json", model_config(vocab_size)),
        ("generation_config.json", generation_config(vocab_size)),
    ):
        part = target / f".part.{name}"
        part.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(part, target / name)
    for source in (*(vocabulary / name for name in VOCABULARY_FILES), SHIPPED / "chat_template.jinja"):
        if source.resolve() != (target / source.name).resolve():
            shutil.copyfile(source, target / f".part.{source.name}")
            os.replace(target / f".part.{source.name}", target / source.name)
    return sum(path.stat().st_size for path in target.iterdir() if path.is_file())
