"""Run conversions in tests, and compare their results."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from kimi_mlx.model.config import load_config
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import ConversionResult, convert
from kimi_mlx.weights.convert_options import ConvertOptions

IDS = np.arange(40).reshape(2, 20) * 7 % 61
GROUPS_OF_32 = ConvertOptions(bits=4, group_size=32)


def run(source: Path, folder: Path, options: ConvertOptions | None = None) -> ConversionResult:
    """Convert a checkpoint."""
    return convert(open_conversion(source, options or ConvertOptions()), folder)


def logits_of(folder: Path) -> np.ndarray:
    """Return the logits of IDS."""
    return np.asarray(load_model(folder, load_config(folder), mx.float32)(mx.array(IDS)))


def logits_of_mlx_lm(folder: Path) -> np.ndarray:
    """Return mlx-lm's logits of IDS."""
    from mlx_lm.utils import load_model as load_mlx_lm

    mx.disable_compile()  # its C++ compiler takes longer than everything else
    model = load_mlx_lm(folder)[0]
    model.set_dtype(mx.float32)
    return np.asarray(model(mx.array(IDS)))


def tensors_of(folder: Path) -> dict[str, mx.array]:
    """Return all tensors of a checkpoint."""
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
