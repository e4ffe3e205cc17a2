"""Test checkpoints and goldens: reproducible, and readable by mlx-lm with the same results as transformers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tests.checkpoints import (
    Golden,
    golden_names,
    load_golden,
    quantize_checkpoint,
    tensor_shapes,
    text_config,
    write_checkpoint,
)

mlx_lm_utils = pytest.importorskip("mlx_lm.utils")


def mlx_lm_logits(folder: Path, golden: Golden) -> np.ndarray:
    model, _ = mlx_lm_utils.load_model(folder)
    return np.array(model(mx.array(golden.input_ids)).astype(mx.float32))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def digest(folder: Path) -> str:
    files = sorted(folder.iterdir())
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


def load_tensors(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = mx.load(str(file))
        assert isinstance(part, dict)
        tensors |= part
    return tensors


@pytest.fixture(scope="module")
def k25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    golden = load_golden("k2.5")
    return write_checkpoint(tmp_path_factory.mktemp("k2.5"), golden.config, golden.seed)


def test_goldens_cover_the_family() -> None:
    assert golden_names() == ["grouped", "grouped-negative", "k2", "k2-thinking", "k2.5", "moonlight"]


def test_a_checkpoint_depends_only_on_config_and_seed(tmp_path: Path) -> None:
    config = load_golden("moonlight").config
    first, again, other = (write_checkpoint(tmp_path / n, config, s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert digest(first) == digest(again)
    assert digest(first) != digest(other)


def test_weights_are_the_same_on_every_machine(k25: Path) -> None:
    weight = load_tensors(k25)["language_model.model.layers.1.mlp.experts.3.up_proj.weight"]
    expected = [-0.03937341272830963, 0.02926323004066944, 0.06515906751155853]
    np.testing.assert_array_equal(np.array(weight[0, :3]), np.array(expected, dtype=np.float32))


def test_a_checkpoint_looks_like_a_published_one(k25: Path) -> None:
    index = json.loads((k25 / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_tensors(k25)
    assert set(index) == set(tensors)
    assert len(set(index.values())) == 2
    assert "vision_tower.encoder.blocks.0.wqkv.weight" in tensors
    shapes = tensor_shapes(text_config(load_golden("k2.5").config))
    assert {f"language_model.{name}" for name in shapes} < set(tensors)
    assert all(tensors[f"language_model.{name}"].shape == shape for name, shape in shapes.items())


def test_bfloat16_keeps_the_correction_bias_in_float32(tmp_path: Path) -> None:
    golden = load_golden("k2")
    tensors = load_tensors(write_checkpoint(tmp_path, golden.config, golden.seed, dtype="bfloat16"))
    others = {t.dtype for name, t in tensors.items() if not name.endswith("e_score_correction_bias")}
    assert others == {mx.bfloat16}
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == mx.float32


# mlx-lm gives experts of a dropped group the score 0, which beats negative scores of kept ones
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "k2" else pytest.mark.slow)
        for name in golden_names()
        if name != "grouped-negative"
    ],
)
def test_goldens_agree_with_mlx_lm(name: str, tmp_path: Path) -> None:
    golden = load_golden(name)
    folder = write_checkpoint(tmp_path, golden.config, golden.seed)
    assert relative_error(mlx_lm_logits(folder, golden), golden.logits) < 1e-5
    assert 1.0 < golden.logits.std() < 10.0


@pytest.mark.slow
@pytest.mark.parametrize("stack_experts", [True, False])
@pytest.mark.parametrize("split_kv_b", [True, False])
def test_mlx_lm_loads_each_affine_layout(split_kv_b: bool, stack_experts: bool, tmp_path: Path, k25: Path) -> None:
    golden = load_golden("k2.5")
    folder = quantize_checkpoint(
        k25, tmp_path, bits=8, group_size=32, split_kv_b=split_kv_b, stack_experts=stack_experts
    )
    assert relative_error(mlx_lm_logits(folder, golden), golden.logits) < 0.2


@pytest.mark.parametrize("group_size", [32, 64])
def test_overrides_and_dtype_reach_the_tensors(group_size: int, tmp_path: Path, k25: Path) -> None:
    head, expert = "language_model.lm_head", "language_model.model.layers.1.mlp.switch_mlp.down_proj"
    overrides = {head: {"bits": 8, "group_size": group_size}, expert: False}
    folder = quantize_checkpoint(k25, tmp_path, 4, group_size, overrides, dtype="bfloat16")
    tensors = load_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    hidden = config["text_config"]["hidden_size"]
    assert config["quantization"][head] == overrides[head]
    assert tensors[f"{head}.weight"].shape[1] == hidden // 4
    assert tensors[f"{head}.scales"].dtype == mx.bfloat16
    assert f"{expert}.scales" not in tensors
    assert tensors["language_model.model.layers.1.mlp.gate.weight"].dtype == mx.bfloat16
    model, _ = mlx_lm_utils.load_model(folder)
    assert model.language_model.lm_head.bits == 8
