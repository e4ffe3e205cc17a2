"""What is computed once a step: rotations and masks."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.rope import ComplexRotation, FastRotation, Rope
from kimi_mlx.model.step import Step
from kimi_mlx.weights.assemble import load_model

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


@pytest.mark.parametrize("magnitude", [1.0, 1.25])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (63, 1), (1_000, 5), (65_000, 300)])
def test_a_shared_rotation_equals_mlx_fast_rope(magnitude: float, offset: int, length: int) -> None:
    rope = Rope(load_config(FOLDER))
    rope.magnitude = magnitude
    x = mx.random.normal((2, 3, length, 64))[..., 32:]
    expected, got = FastRotation(rope, offset)(x), ComplexRotation(rope, offset, length)(x)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-6, atol=1e-6)
    assert ComplexRotation(rope, offset, length)(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_a_mask_is_made_once_for_all_layers() -> None:
    step = Step(Rope(load_config(FOLDER)), offset=2, length=2)
    mask = step.mask(heads=3, dtype=mx.float32)
    assert mask.tolist() == [[0, 0, 0, -np.inf], [0, 0, 0, 0]] * 3
    assert step.mask(heads=3, dtype=mx.float32) is mask
    assert step.last(1).mask(heads=3, dtype=mx.float32).tolist() == [0]


@pytest.mark.parametrize("last", [1, 8, 9, 40])
def test_the_last_states_alone_are_the_last_of_all_states(model: Model, last: int) -> None:
    mx.random.seed(5)
    tokens = mx.random.randint(0, model.config.vocab_size, (1, 40))
    all_caches, caches = model.make_cache(), model.make_cache()
    expected, got = model.hidden(tokens, all_caches, last=40), model.hidden(tokens, caches, last=last)
    np.testing.assert_allclose(np.array(got), np.array(expected[:, -last:]), rtol=1e-4, atol=1e-4)
    for all_cache, cache in zip(all_caches, caches, strict=True):
        assert cache.offset == 40
        np.testing.assert_allclose(np.array(cache.state[0]), np.array(all_cache.state[0]), rtol=1e-4, atol=1e-4)
