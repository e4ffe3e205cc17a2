"""The vision tower in every layout of a checkpoint, and checkpoints that lack it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.parallel.placement import STRATEGIES, SplitGranularity, place
from kimi_mlx.weights.assemble import load_model
from kimi_mlx.weights.convert_options import ConvertOptions
from kimi_mlx.weights.convert_plan import VISION_FILE
from kimi_mlx.weights.index import has_vision, lacks_vision
from kimi_mlx.weights.layer_plan import check_checkpoint
from tests.unit.weights.conversions import IDS, run, tensors_of
from tests.vision_checkpoints import (
    K2_5,
    Tensors,
    add_quantization,
    dequantize_vision,
    published_file,
    quantize_vision,
    rewrite,
    to_mlx_vlm,
)

GRIDS = [(1, 4, 6), (2, 2, 2)]


def load(folder: Path) -> Model:
    return load_model(folder, load_config(folder), mx.float32)


def parameters_of_tower(model: Model) -> dict[str, mx.array]:
    assert model.vision is not None
    return dict(tree_flatten(model.vision.parameters()))


def features_of(folder: Path) -> np.ndarray:
    size = sum(frames * rows * columns for frames, rows, columns in GRIDS)
    pixels = mx.array(np.random.default_rng(0).integers(0, 256, (size, 3, 14, 14), np.uint8))
    return np.array(load(folder).image_features(pixels, GRIDS))


def as_matrix(tensors: Tensors) -> Tensors:
    name = "vision_tower.patch_embed.proj.weight"
    return {**tensors, name: tensors[name].reshape(tensors[name].shape[0], -1)}


@pytest.mark.parametrize("change", [lambda tensors: tensors, to_mlx_vlm, as_matrix], ids=["own", "mlx-vlm", "matrix"])
def test_a_float_tower_is_the_same_in_all_layouts(change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    folder = rewrite(tmp_path / "layout", change)
    check_checkpoint(folder, load_config(folder))
    expected, ours = parameters_of_tower(load(K2_5)), parameters_of_tower(load(folder))
    assert ours.keys() == expected.keys()
    assert all(mx.array_equal(array, expected[name]) for name, array in ours.items())


@pytest.mark.parametrize("layout", ["own", "mlx-vlm"])
def test_a_quantized_tower_computes_with_its_dequantized_values(layout: str, tmp_path: Path) -> None:
    rename = to_mlx_vlm if layout == "mlx-vlm" else dict[str, mx.array]
    is_chosen = (lambda path: path.startswith("mm_")) if layout == "mlx-vlm" else (lambda path: True)  # what it does
    quantized = rewrite(tmp_path / "quantized", lambda tensors: rename(quantize_vision(tensors, is_chosen)))
    floats = rewrite(tmp_path / "floats", lambda tensors: dequantize_vision(quantize_vision(tensors, is_chosen)))
    ours, expected = features_of(add_quantization(quantized)), features_of(floats)
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "hybrid:3:1", "pipeline:1:1"])
def test_only_rank_0_holds_the_tower(strategy: str) -> None:
    config = load_config(K2_5)
    shares = place(config, strategy, 2, SplitGranularity(expert=32, shared=32, dense=32)).shares
    assert [share.has_vision for share in shares] == [True, False]
    for share in shares:
        names = {name for name, _ in tree_flatten(load_model(K2_5, config, mx.float32, share).parameters())}
        assert any(name.startswith("vision.") for name in names) == share.has_vision


@pytest.mark.parametrize("missing", [(3,), (4,), (3, 4)])
def test_a_checkpoint_without_files_of_the_tower_is_a_text_model(missing: tuple[int, ...], tmp_path: Path) -> None:
    folder = rewrite(tmp_path / "checkpoint", dict)
    assert has_vision(folder)
    assert not lacks_vision(folder)
    expected = np.array(load(folder)(mx.array(IDS)))
    for number in missing:
        (folder / f"model-{number:05}-of-000004.safetensors").unlink()
    model = load(folder)
    assert model.vision is None
    assert model.config.vision is not None
    assert not has_vision(folder)
    assert lacks_vision(folder)
    assert np.array_equal(np.array(model(mx.array(IDS))), expected)


def test_a_checkpoint_that_never_had_a_tower_is_a_text_model(tmp_path: Path) -> None:
    folder = rewrite(
        tmp_path / "text", lambda tensors: {n: t for n, t in tensors.items() if published_file(n) < "model-00003"}
    )
    assert load(folder).vision is None
    assert not has_vision(folder)
    assert not lacks_vision(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {n: v for n, v in t.items() if ".blocks.1.wo" not in n},
            r"lacks the tensors `vision_tower.*wo.bias",
        ),
        (lambda t: {**t, "vision_tower.extra": mx.zeros(3)}, "has the tensor `vision_tower.extra`"),
        (
            lambda t: {**t, "vision_tower.patch_embed.proj.weight": mx.zeros((64, 14, 3, 14))},
            r"has shape \(64, 14, 3, 14\); `config.json` requires \(64, 3, 14, 14\)",
        ),
        (lambda t: {**t, "mm_projector.proj.2.bias": mx.zeros(7)}, r"has shape \(7,\)"),
    ],
)
def test_a_damaged_tower_is_an_error(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    folder = rewrite(tmp_path / "damaged", change)
    with pytest.raises(WeightsError, match=message):
        load(folder)


@pytest.mark.parametrize("change", [dict, to_mlx_vlm, quantize_vision], ids=["own", "mlx-vlm", "quantized"])
@pytest.mark.parametrize("options", [ConvertOptions(), ConvertOptions(bits=4, group_size=32)], ids=["copy", "4-bit"])
def test_a_conversion_copies_the_tower(
    change: Callable[[Tensors], Tensors], options: ConvertOptions, tmp_path: Path
) -> None:
    source = rewrite(tmp_path / "source", change)
    if change is quantize_vision:
        add_quantization(source)
    run(source, tmp_path / "out", options)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    tower = {name for name in before if published_file(name) > "model-00003"}
    assert tower == {name for name in after if published_file(name) > "model-00003"}
    for name in tower:
        assert before[name].dtype == after[name].dtype
        assert before[name].shape == after[name].shape
        assert mx.array_equal(before[name], after[name]), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {index[name] for name in tower} == {VISION_FILE}
    assert np.array_equal(features_of(tmp_path / "out"), features_of(source))


def test_a_conversion_without_vision_is_one_of_a_text_model(tmp_path: Path) -> None:
    run(K2_5, tmp_path / "whole")
    run(K2_5, tmp_path / "text", ConvertOptions(no_vision=True))
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    assert "vision_config" not in raw
    assert load(tmp_path / "text").vision is None
    for file in (tmp_path / "text").glob("model-0*.safetensors"):  # also for an unfinished run of an earlier version
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
