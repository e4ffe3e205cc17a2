"""Synthetic checkpoints and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from kimi_mlx.bench.workloads import (
    COMMON,
    SHAPES,
    random_prompt,
    synthetic_checkpoint,
    synthetic_config,
    write_synthetic,
)
from kimi_mlx.errors import UsageError, WeightsError
from kimi_mlx.model.config import parse_config
from kimi_mlx.runtime.load import load_share
from tests.bench.tiny import TINY, write_tiny


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a temporary cache folder and a small shape."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(SHAPES, "tiny", TINY)  # pyright: ignore[reportArgumentType]
    return tmp_path


@pytest.mark.parametrize("shape", ["wide", "deep"])
def test_dimensions_of_the_shapes(shape: str) -> None:
    config = parse_config(synthetic_config(shape))
    layers, hidden, experts, chosen = {"wide": (8, 1024, 32, 8), "deep": (61, 256, 16, 4)}[shape]
    assert (config.num_hidden_layers, config.hidden_size) == (layers, hidden)
    assert (config.n_routed_experts, config.num_experts_per_tok) == (experts, chosen)
    assert not config.is_moe_layer(0)
    assert config.is_moe_layer(1)


def test_weights_are_random_with_mean_0_and_variance_1_over_columns(tmp_path: Path) -> None:
    write_synthetic(tmp_path, {**COMMON, **TINY})
    tensors = mx.load(str(tmp_path / "model-00003-of-00004.safetensors"))
    assert isinstance(tensors, dict)
    path = "model.layers.1.mlp.switch_mlp.gate_proj"
    parts = [tensors[f"{path}.{part}"] for part in ("weight", "scales", "biases")]
    matrix = mx.dequantize(*parts, group_size=64, bits=4).astype(mx.float32)
    assert matrix.shape == (8, 128, 128)
    assert abs(matrix.mean().item()) < 0.002
    assert matrix.var().item() * 128 == pytest.approx(1, rel=0.05)


def test_a_checkpoint_has_an_index_of_all_tensors(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {
        name: path.name
        for path in folder.glob("*.safetensors")
        for name in mx.load(str(path))  # pyright: ignore[reportGeneralTypeIssues]
    }
    assert weight_map == stored


def test_activations_stay_finite(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "tiny")
    model = load_share(folder, parse_config(json.loads((folder / "config.json").read_text())))
    logits = model(mx.array([random_prompt(512, 16, 0)]))
    assert mx.all(mx.isfinite(logits)).item()
    assert mx.all(logits.std() > 0.3).item()


def test_a_checkpoint_is_created_once(caches: Path) -> None:
    layers: list[tuple[int, int]] = []
    folder = synthetic_checkpoint("tiny", lambda done, total: layers.append((done, total)))
    assert layers == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert folder.is_relative_to(caches)
    assert synthetic_checkpoint("tiny", lambda done, total: layers.append((done, total))) == folder
    assert len(layers) == 4
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_interrupted_checkpoint_leaves_no_files(caches: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic_checkpoint("tiny", interrupt)
    assert list((caches / "kimi-mlx" / "synthetic").iterdir()) == []


def test_another_shape_gets_another_folder(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = synthetic_checkpoint("tiny")
    monkeypatch.setitem(SHAPES, "tiny", {**TINY, "num_hidden_layers": 2})  # pyright: ignore[reportArgumentType]
    assert synthetic_checkpoint("tiny") != first


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown synthetic checkpoint `tall`"):
        synthetic_checkpoint("tall")


def test_a_cache_that_cannot_be_written_is_named(caches: Path) -> None:
    (caches / "kimi-mlx").write_text("not a folder")
    with pytest.raises(WeightsError, match="cannot be written"):
        synthetic_checkpoint("tiny")


def test_prompts_are_reproducible_and_differ() -> None:
    assert random_prompt(100, 8, 0) == random_prompt(100, 8, 0)
    assert random_prompt(100, 8, 0) != random_prompt(100, 8, 1)
    assert random_prompt(100, 8, 0, seed=1) != random_prompt(100, 8, 0)
    assert all(0 <= id < 100 for id in random_prompt(100, 1000, 0))
