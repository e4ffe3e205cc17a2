"""Write the draft model as published ones are: tensors with a reduced vocabulary, and `config.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from scripts.mini.architecture import Shape
from scripts.mini.draft_architecture import DRAFT_CONFIG
from scripts.mini.export import write_json, write_tensors
from scripts.mini.model import Parameters

GROUP_SIZE, BITS = 32, 8
QUANTIZATION: dict[str, Any] = {"group_size": GROUP_SIZE, "bits": BITS, "mode": "affine"}


def quantize_draft(parameters: Parameters) -> Parameters:
    """Return the tensors with all matrices in MLX's 8-bit affine form."""
    tensors: Parameters = {}
    for name, value in parameters.items():
        if value.ndim < 2:
            tensors[name] = value
        else:
            names = [name.removesuffix("weight") + part for part in ("weight", "scales", "biases")]
            tensors |= dict(zip(names, mx.quantize(value, GROUP_SIZE, BITS), strict=True))
    return tensors


def write_draft(folder: Path, tensors: Parameters, drafted: np.ndarray, shape: Shape, progress: dict[str, Any]) -> None:
    """Write the folder of a draft model, each file atomically.

    Args:
        folder: target; created if missing.
        tensors: parameters, quantized or not.
        drafted: tokens that can be drafted, ascending.
        shape: shape of kimi-mini.
        progress: step and tokens of the training, for the metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "d2t": mx.array(drafted - np.arange(drafted.size)),
        "t2d": mx.array(np.isin(np.arange(shape.vocab_size), drafted).tolist()),
    }
    is_quantized = any(name.endswith(".scales") for name in tensors)
    blocks = dict.fromkeys(("quantization", "quantization_config"), QUANTIZATION) if is_quantized else {}
    sizes = {"vocab_size": shape.vocab_size, "draft_vocab_size": drafted.size, "torch_dtype": "float32"}
    write_tensors(folder, tensors | table, progress)
    write_json(folder, "config.json", {**DRAFT_CONFIG, **sizes, **blocks})


def load_draft(folder: Path) -> tuple[Parameters, np.ndarray]:
    """Return the dequantized parameters of an exported draft model, and the tokens that it drafts."""
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    parameters: Parameters = {}
    for name, value in tensors.items():
        base = name.removesuffix("weight")
        if f"{base}scales" in tensors and name.endswith("weight"):
            value = mx.dequantize(value, tensors[f"{base}scales"], tensors[f"{base}biases"], GROUP_SIZE, BITS)
        if not name.endswith((".scales", ".biases")) and name not in ("d2t", "t2d"):
            parameters[name] = value
    return parameters, np.array(tensors["d2t"]) + np.arange(tensors["d2t"].size)
