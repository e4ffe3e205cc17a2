"""Quantized checkpoints: logits equal mlx-lm's on the same files, and those of the dequantized values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.config import load_config
from kimi_mlx.model.weight import ConcatLinear
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.reader import open_checkpoint
from tests.checkpoints import Golden, load_golden, quantize_checkpoint, write_checkpoint
from tests.parity.test_logits import feed, relative_error

LAYOUTS: dict[str, dict[str, Any]] = {
    "4-bit": {"bits": 4, "group_size": 32},
    "8-bit": {"bits": 8, "group_size": 64},
    "experts one by one": {"bits": 4, "group_size": 32, "stack_experts": False},
    "overrides": {
        "bits": 4,
        "group_size": 32,
        "overrides": {
            "model.layers.1.mlp.shared_experts.gate_proj": {"bits": 8, "group_size": 32},
            "model.layers.1.self_attn.kv_a_proj_with_mqa": {"bits": 8, "group_size": 64},
            "model.layers.2.mlp.switch_mlp.up_proj": {"bits": 6, "group_size": 32},
            "lm_head": False,
        },
    },
}


def quantized(golden: Golden, folder: Path, **options: Any) -> Path:
    """Write a quantized checkpoint of a golden's model."""
    source = write_checkpoint(folder / "float", golden.config, golden.seed)
    return quantize_checkpoint(source, folder / "quantized", **options)


def logits_of_mlx_lm(folder: Path, ids: mx.array, dtype: mx.Dtype | None = None) -> np.ndarray:
    from mlx_lm.utils import load_model as load_mlx_lm

    model = load_mlx_lm(folder)[0]
    if dtype is not None:
        model.set_dtype(dtype)
    mx.disable_compile()  # its C++ compiler takes longer than everything else
    try:
        return np.asarray(model(ids).astype(mx.float32))
    finally:
        mx.enable_compile()


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(pytest.param("k2", layout, marks=() if layout == "4-bit" else pytest.mark.slow) for layout in LAYOUTS),
        pytest.param("k2.5", "4-bit", marks=pytest.mark.slow),
        pytest.param("moonlight", "overrides", marks=pytest.mark.slow),
        pytest.param("grouped", "4-bit", marks=pytest.mark.slow),
    ],
)
def test_logits_equal_mlx_lm(name: str, layout: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    folder = quantized(golden, tmp_path, **LAYOUTS[layout])
    ids = golden.input_ids[:, :66]
    expected = logits_of_mlx_lm(folder, mx.array(ids))
    model = load_model(folder, load_config(folder), mx.float32)
    for sizes in ([1000], [50, 1]):
        assert relative_error(feed(model, ids, sizes), expected) < 2e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["k2.5", "moonlight"])
def test_whole_kv_b_proj_is_not_quantized_twice(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    folder = quantized(golden, tmp_path, bits=4, group_size=32, split_kv_b=False)
    model = load_model(folder, load_config(folder), mx.float32)
    reference = load_model(dequantize(folder, tmp_path / "dequantized"), load_config(folder), mx.float32)
    ids = golden.input_ids[:, :66]
    for sizes in ([1000], [50, 1]):
        expected = np.asarray(feed(reference, ids, sizes))
        assert relative_error(feed(model, ids, sizes), expected) < 2e-5


def dequantize(folder: Path, target: Path) -> Path:
    """Write the float checkpoint with exactly the values of a quantized one."""
    checkpoint = open_checkpoint(folder, load_config(folder)).checkpoint
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)
        tensors |= {name.removeprefix("language_model."): value for name, value in loaded.items()}
    floats: dict[str, mx.array] = {}
    for name, value in tensors.items():
        path, _, kind = name.rpartition(".")
        quantization = checkpoint.matrices.quantization(path) if kind == "weight" else None
        if quantization is not None:
            scales, biases = tensors[f"{path}.scales"], tensors[f"{path}.biases"]
            value = mx.dequantize(value, scales, biases, quantization.group_size, quantization.bits)
        if kind not in ("scales", "biases"):
            floats[name] = value
    target.mkdir()
    mx.save_safetensors(str(target / "model.safetensors"), floats)
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if not name.startswith("quantization")}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def test_parts_quantized_differently_are_not_fused(tmp_path: Path) -> None:
    folder = quantized(load_golden("k2"), tmp_path, **LAYOUTS["overrides"])
    model = load_model(folder, load_config(folder), mx.float32)
    assert isinstance(model.layers[1].self_attn.qkv_a_proj, ConcatLinear)
    assert "shared_experts" in model.layers[1].mlp
    assert "shared_experts" in model.layers[2].mlp
    assert isinstance(model.layers[2].mlp.gate_up_proj, ConcatLinear)


def test_shared_experts_quantized_alike_are_fused_with_the_routed_ones(tmp_path: Path) -> None:
    folder = quantized(load_golden("moonlight"), tmp_path, **LAYOUTS["4-bit"])
    config = load_config(folder)
    mlp = load_model(folder, config, mx.float32).layers[1].mlp
    assert "shared_experts" not in mlp
    assert mlp.down_proj.weight.shape[0] == config.n_routed_experts + config.n_shared_experts


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_mlx_lm(tmp_path: Path) -> None:
    golden = load_golden("k2")
    folder = quantized(golden, tmp_path, bits=4, group_size=32)
    ids = mx.array(golden.input_ids[:, :16])
    expected = np.asarray(load_model(folder, load_config(folder), mx.float32)(ids))
    logits = load_model(folder, load_config(folder), mx.bfloat16)(ids)
    assert logits.dtype == mx.bfloat16
    peer = logits_of_mlx_lm(folder, ids, mx.bfloat16)
    ours = relative_error(logits.astype(mx.float32), expected)
    theirs = relative_error(mx.array(peer), expected)
    assert ours < 1.2 * theirs  # large for both: a rounded router score chooses another expert
