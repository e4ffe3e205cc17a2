"""Checkpoints with a vision tower in the layouts of real repositories, made from one in the published layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from kimi_mlx.model.vision_names import is_vision
from tests.checkpoints import FORMATS

K2_5 = FORMATS / "int4-k2.5"
"""INT4 experts, the rest and the tower in bfloat16."""

Tensors = dict[str, mx.array]


def read_tensors(folder: Path) -> Tensors:
    """Return all tensors of a checkpoint, without the files of other tools."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("model*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= loaded
    return tensors


def rewrite(target: Path, change: Callable[[Tensors], Tensors], file_of: Callable[[str], str] | None = None) -> Path:
    """Write K2_5 with changed tensors into a new folder.

    Args:
        target: the folder.
        change: function from all tensors to those of the new checkpoint.
        file_of: name of a tensor -> name of its file; None for `published_file`.
    """
    target.mkdir(parents=True)
    for file in K2_5.iterdir():
        if not file.name.startswith("model"):
            (target / file.name).write_bytes(file.read_bytes())
    files: dict[str, Tensors] = {}
    for name, tensor in change(read_tensors(K2_5)).items():
        files.setdefault((file_of or published_file)(name), {})[name] = tensor
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        mx.save_safetensors(str(target / file), tensors)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return target


def published_file(name: str) -> str:
    """Return the file of a tensor: as published, the projector and the tower have files of their own, the last two."""
    number = 3 if name.startswith("mm_projector.") else 4 if is_vision(name) else 1 + (".layers." not in name)
    return f"model-{number:05}-of-000004.safetensors"


def to_mlx_vlm(tensors: Tensors) -> Tensors:
    """Return the names and axes that mlx-vlm writes, with the channels of the convolution last."""
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("vision_tower."):
            name = name.replace("encoder.", "").replace(".wqkv", ".attn.wqkv").replace(".wo", ".attn.wo")
        if name == "vision_tower.patch_embed.proj.weight":
            tensor = mx.contiguous(tensor.transpose(0, 2, 3, 1))
        renamed[name] = tensor
    return renamed


def quantize_vision(tensors: Tensors, is_chosen: Callable[[str], bool] = lambda path: True) -> Tensors:
    """Return the tensors with the tower's matrices in 8 bits and groups of 32, as far as their columns divide."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        path = name.removesuffix(".weight")
        is_matrix = is_vision(name) and tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        if is_matrix and is_chosen(path):
            parts = mx.quantize(tensor, group_size=32, bits=8)
            result |= dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=True))
        else:
            result[name] = tensor
    return result


def dequantize_vision(tensors: Tensors) -> Tensors:
    """Return the float32 values of the output of quantize_vision."""
    result = {name: tensor for name, tensor in tensors.items() if not (is_vision(name) and _is_scale(name))}
    for name in tensors:
        path = name.removesuffix(".scales")
        if path != name and is_vision(name):
            scales, biases = (tensors[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            result[f"{path}.weight"] = mx.dequantize(tensors[f"{path}.weight"], scales, biases, group_size=32, bits=8)
    return result


def _is_scale(name: str) -> bool:
    return name.endswith((".scales", ".biases"))


def add_quantization(folder: Path) -> Path:
    """Add MLX's `quantization` of the tower to `config.json`, beside the format of the experts."""
    path = folder / "config.json"
    block = {"group_size": 32, "bits": 8, "mode": "affine"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization": block}))
    return folder
