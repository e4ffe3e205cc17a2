"""Write a training checkpoint as the shipped model: quantized weights and the configuration files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from kimi_mlx.runtime.generation_config import MAX_TOKENS_KEY
from scripts.mini import checkpoint
from scripts.mini.architecture import CONFIG
from scripts.mini.model import Parameters
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
    write_tensors(target, quantize(parameters), progress)
    write_json(target, "config.json", model_config(vocab_size))
    write_json(target, "generation_config.json", generation_config(vocab_size))
    copy_text_files(vocabulary, SHIPPED, target)
    return folder_bytes(target)


def copy_text_files(vocabulary: Path, template: Path, target: Path) -> None:
    """Copy the files of a vocabulary, and the chat template of another folder, each file atomically."""
    for source in (*(vocabulary / name for name in VOCABULARY_FILES), template / "chat_template.jinja"):
        if source.resolve() != (target / source.name).resolve():
            shutil.copyfile(source, target / f".part.{source.name}")
            os.replace(target / f".part.{source.name}", target / source.name)


def write_tensors(target: Path, tensors: Parameters, progress: dict[str, Any]) -> None:
    """Write `model.safetensors` atomically, with the run's progress as metadata."""
    part = target / ".part.safetensors"
    metadata = {"format": "mlx", "step": str(progress["step"]), "tokens": str(progress["tokens"])}
    mx.save_safetensors(str(part), tensors, metadata)
    os.replace(part, target / "model.safetensors")


def write_json(target: Path, name: str, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    part = target / f".part.{name}"
    part.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(part, target / name)


def folder_bytes(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
