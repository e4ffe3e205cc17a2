"""Memory of the vision tower and of its encodings, against loaded towers."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.planner.model_shape import known_shape, shape_of_config
from kimi_mlx.planner.portions import make_portions
from kimi_mlx.sizing.vision import encode_bytes, tower_values
from kimi_mlx.units import GB
from kimi_mlx.weights.assemble import load_model
from tests.vision_checkpoints import K2_5


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(K2_5, load_config(K2_5), mx.float32)


def test_the_size_of_a_tower(model: Model) -> None:
    assert model.vision is not None
    arrays: dict[str, mx.array] = dict(tree_flatten(model.vision.parameters()))
    assert tower_values(model.vision.config) == sum(array.size for array in arrays.values() if array.ndim > 1)


def test_k2_5_has_a_tower_of_0_9_gb_on_rank_0() -> None:
    shape = known_shape("kimi-k2.5")
    assert shape.bytes.vision == pytest.approx(0.94 * GB, rel=0.02)
    assert known_shape("kimi-k2-thinking").bytes.vision == 0
    for strategy in ("hybrid", "tensor", "expert", "pipeline", "hybrid:3:1"):
        assert [portion.vision for portion in make_portions(strategy, shape, 2)] == [1, 0]
    assert shape_of_config("small", load_config(K2_5)).bytes.vision > 0


@pytest.mark.parametrize(
    "grid", [(1, 16, 16), *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((4, 16, 24), (1, 32, 48)))]
)
def test_the_memory_of_an_encoding_is_an_upper_estimate(model: Model, grid: tuple[int, int, int]) -> None:
    assert model.vision is not None
    patches = grid[0] * grid[1] * grid[2]
    pixels = mx.zeros((patches, 3, 14, 14), mx.uint8)
    mx.eval(pixels)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    features = model.image_features(pixels, [grid])
    used = mx.get_peak_memory() - before - features.nbytes
    estimate = encode_bytes(model.vision.config, 4, is_fused=False, patches=patches)
    assert used < estimate < 6 * used
