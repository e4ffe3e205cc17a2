"""Logits against transformers' DeepseekV3ForCausalLM (goldens), for every way to chunk the tokens."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import Golden, golden_names, load_golden, write_checkpoint

TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=golden_names())
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture(scope="module")
def model(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp(golden.name), golden.config, golden.seed)
    return load_model(folder, load_config(folder), mx.float32)


def relative_error(actual: mx.array, expected: np.ndarray) -> float:
    """Return the norm of the difference divided by the norm of the expected values."""
    difference = np.asarray(actual, dtype=np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def feed(model: Model, ids: np.ndarray, sizes: list[int]) -> mx.array:
    """Return the logits of all positions, computed in chunks of the given sizes; the last size repeats."""
    cache, parts, start = model.make_cache(), [], 0
    while start < ids.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        parts.append(model(mx.array(ids[:, start : start + size]), cache))
        start += size
    return mx.concatenate(parts, axis=1)


def test_there_is_a_golden_for_each_kind_of_model() -> None:
    assert {"k2", "k2.5", "moonlight", "grouped"} <= set(golden_names())


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        pytest.param([10_000], None, id="whole", marks=pytest.mark.slow),
        pytest.param([1], 40, id="by-1", marks=pytest.mark.slow),
        pytest.param([7], None, id="by-7", marks=pytest.mark.slow),
        pytest.param([64], None, id="by-64", marks=pytest.mark.slow),
        pytest.param([50, 1], 66, id="50-then-decode"),
    ],
)
def test_logits_equal_transformers(golden: Golden, model: Model, sizes: list[int], count: int | None) -> None:
    error = relative_error(feed(model, golden.input_ids[:, :count], sizes), golden.logits[:, :count])
    assert error < TOLERANCE, f"{golden.name} {sizes}: {error:.2e}"
