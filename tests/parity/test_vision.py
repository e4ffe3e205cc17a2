"""Features of images and logits of prompts with images, against transformers' KimiK25 model (goldens)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model import vision_attention
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.image_rows import ImageRows, place_features
from kimi_mlx.model.vision import VisionTower
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import VISION_72, VISION_GOLDENS, Config, Grids, make_pixels, write_checkpoint
from tests.vision_tower import PLACEHOLDER, dequantize, quantize, vision_tower, vision_weights

TOLERANCE = 2e-5
SMALL = ["4x4", "12x10", "70x30", "4-frames", "two-images", "narrow"]
LARGE = [pytest.param("64x64", marks=pytest.mark.slow)]


@dataclass(frozen=True)
class VisionGolden:
    """Results of transformers in float32, for weights and pixels of a seed."""

    config: Config
    seed: int
    grids: Grids
    arrays: dict[str, np.ndarray]

    @property
    def pixels(self) -> mx.array:
        return mx.array(make_pixels(self.seed, self.grids, self.config["vision_config"]["patch_size"]))

    @property
    def tower(self) -> VisionTower:
        raw = self.config["vision_config"]
        return vision_tower(raw, vision_weights(raw, self.seed))


def load_vision_golden(name: str) -> VisionGolden:
    with np.load(VISION_GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    grids = tuple((int(t), int(h), int(w)) for t, h, w in arrays.pop("grids"))
    return VisionGolden(json.loads(str(arrays.pop("config"))), int(arrays.pop("seed")), grids, arrays)


def relative_error(actual: mx.array, expected: np.ndarray | mx.array) -> float:
    """Return the norm of the difference divided by the norm of the expected values."""
    wanted = np.asarray(expected, dtype=np.float64)
    assert actual.shape == wanted.shape
    return float(np.linalg.norm(np.asarray(actual, dtype=np.float64) - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_features_equal_transformers(name: str) -> None:
    golden = load_vision_golden(name)
    features = golden.tower(golden.pixels, golden.grids)
    assert features.dtype == mx.float32
    error = relative_error(features[:, mx.array(golden.arrays["columns"])], golden.arrays["features"])
    assert error < TOLERANCE, f"{name}: {error:.2e}"


@pytest.fixture(scope="module")
def prompt() -> VisionGolden:
    return load_vision_golden("prompt")


@pytest.fixture(scope="module")
def model(prompt: VisionGolden, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("prompt"), prompt.config, prompt.seed)
    return load_model(folder, load_config(folder), mx.float32)


def test_logits_of_a_prompt_with_images_equal_transformers(prompt: VisionGolden, model: Model) -> None:
    tokens = mx.array(prompt.arrays["input_ids"])
    logits = model(tokens, pixel_values=prompt.pixels, grid_thw=mx.array(prompt.grids))
    assert relative_error(logits, prompt.arrays["logits"]) < TOLERANCE


@pytest.mark.parametrize("size", [5, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 16))])
def test_a_chunk_may_begin_and_end_inside_an_image(prompt: VisionGolden, model: Model, size: int) -> None:
    tokens = mx.array(prompt.arrays["input_ids"])
    features = model.image_features(prompt.pixels, prompt.grids)
    rows = place_features(tokens, PLACEHOLDER, features)
    cache, parts = model.make_cache(), []
    for start in range(0, tokens.shape[1], size):
        chunk = tokens[:, start : start + size]
        cut = [part for image in rows if (part := cut_rows(image, start, start + chunk.shape[1]))]
        slices = [SequenceSlice(cache, chunk.shape[1], chunk.shape[1])]
        parts.append(model.logits(model.hidden(chunk, slices, cut)))
    assert relative_error(mx.concatenate(parts, axis=1), prompt.arrays["logits"]) < TOLERANCE


def cut_rows(image: ImageRows, start: int, stop: int) -> ImageRows | None:
    """Return the part of an image's rows in a chunk of tokens, or None."""
    first, end = max(image.start, start), min(image.start + image.rows.shape[0], stop)
    rows = image.rows[first - image.start : end - image.start]
    return ImageRows(first - start, rows) if first < end else None


def test_images_beside_a_text_only_sequence(prompt: VisionGolden, model: Model) -> None:
    tokens = mx.array(prompt.arrays["input_ids"])
    text = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    rows = place_features(tokens, PLACEHOLDER, model.image_features(prompt.pixels, prompt.grids))
    moved = [replace(image, start=image.start + text.shape[1]) for image in rows]
    slices = [SequenceSlice(model.make_cache(), ids.shape[1], ids.shape[1]) for ids in (text, tokens)]
    logits = model.logits(model.hidden(mx.concatenate([text, tokens], axis=1), slices, moved))
    assert relative_error(logits[:, text.shape[1] :], prompt.arrays["logits"]) < TOLERANCE
    assert relative_error(logits[:, : text.shape[1]], model(text)) < TOLERANCE


@pytest.mark.parametrize("name", ["12x10", "4-frames"])
@pytest.mark.parametrize("attend", ["fused", "blocks of 7"])
def test_every_form_of_attention_equals_transformers(name: str, attend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forms: dict[str, Callable[..., mx.array]] = {
        "fused": vision_attention.fused,
        "blocks of 7": lambda q, k, v: vision_attention.blockwise(q, k, v, 7),
    }
    monkeypatch.setattr(vision_attention, "attend_image", forms[attend])
    test_features_equal_transformers(name)


@pytest.mark.parametrize(("bits", "group_size", "mode"), [(4, 32, "affine"), (8, 32, "affine"), (8, 32, "mxfp8")])
def test_a_quantized_tower_equals_its_dequantized_values(bits: int, group_size: int, mode: str) -> None:
    weights = quantize(vision_weights(VISION_72, 3), bits, group_size, mode)
    quantized = [name.split(".")[-1] for name, weight in weights.items() if weight.quantization]
    assert quantized.count("wqkv") == 2
    assert "fc1" not in quantized  # 80 columns are not whole groups
    grids = ((1, 4, 6), (2, 2, 4))
    pixels = mx.array(make_pixels(3, grids, 14))
    features = vision_tower(VISION_72, weights)(pixels, grids)
    assert relative_error(features, vision_tower(VISION_72, dequantize(weights))(pixels, grids)) < TOLERANCE
    floats = vision_tower(VISION_72, vision_weights(VISION_72, 3))(pixels, grids)
    assert relative_error(features, floats) > 100 * TOLERANCE


def test_bfloat16_stays_close_to_float32() -> None:
    golden = load_vision_golden("narrow")
    raw = golden.config["vision_config"]
    features = vision_tower(raw, vision_weights(raw, golden.seed, mx.bfloat16))(golden.pixels, golden.grids)
    assert features.dtype == mx.bfloat16
    columns = mx.array(golden.arrays["columns"])
    assert relative_error(features.astype(mx.float32)[:, columns], golden.arrays["features"]) < 0.02


def test_there_is_a_golden_for_each_kind_of_image() -> None:
    assert {*SMALL, "64x64", "prompt"} == {path.stem for path in Path(VISION_GOLDENS).glob("*.npz")}
