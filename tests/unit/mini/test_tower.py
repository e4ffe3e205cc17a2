"""The training tower against kimi-mlx's own, and the parts of its training."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.text.tokenizer import Tokenizer
from scripts.mini import vision_batches
from scripts.mini.batches import TOKENS_PER_STEP
from scripts.mini.model import replace_rows
from scripts.mini.render import Renderer
from scripts.mini.scenes import GRIDS
from scripts.mini.tower import features, init_tower, interpolation, is_tower, probe_loss, tanh_gelu
from scripts.mini.training import Settings
from scripts.mini.vision_architecture import TABLE
from scripts.mini.vision_batches import make_dialogue_batch, make_picture_batch
from scripts.mini.vision_training import TEXT_MODEL, VisionTrainer, text_parameters


@pytest.fixture(scope="module")
def tower() -> dict[str, mx.array]:
    return init_tower(seed=3)


def test_gelu_and_its_gradient():
    x = mx.linspace(-4, 4, 41)
    reference = lambda x: 0.5 * x * (1 + mx.tanh(0.7978845608 * (x + 0.044715 * x**3)))  # noqa: E731
    assert mx.allclose(tanh_gelu(x), reference(x), atol=1e-6)
    ours, theirs = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (tanh_gelu, reference))
    assert mx.allclose(ours, theirs, atol=1e-5)


def test_replaced_rows_and_their_gradients():
    rows, others, places = mx.random.normal((6, 3)), mx.random.normal((2, 3)), mx.array([4, 1])
    result = replace_rows(rows, others, places)
    assert mx.array_equal(result[4], others[0])
    assert mx.array_equal(result[1], others[1])
    assert mx.array_equal(result[0], rows[0])
    weights = mx.random.normal((6, 3))
    grads = mx.grad(lambda a, b: (replace_rows(a, b, places) * weights).sum(), argnums=(0, 1))(rows, others)
    assert mx.array_equal(grads[1], weights[places])
    assert mx.array_equal(grads[0][1], mx.zeros(3))
    assert mx.array_equal(grads[0][0], weights[0])


def test_interpolation_keeps_constants_and_the_table_itself():
    for size in (2, 8, 13, 30):
        assert np.allclose(interpolation(size).sum(axis=1), 1.0, atol=1e-5)
    assert np.allclose(interpolation(TABLE), np.eye(TABLE), atol=1e-6)


@pytest.mark.slow
def test_pictures_of_a_batch_do_not_see_each_other(tower: dict[str, mx.array]):
    batch, grid = make_picture_batch("seed", step=1, rank=0)
    patches = batch.arrays["patches"][:3]
    together = features(tower, patches, grid)
    alone = features(tower, patches[1:2], grid)
    tokens = alone.shape[0]
    assert mx.allclose(together[tokens : 2 * tokens], alone, atol=1e-4)


def test_batches_are_reproducible_and_of_one_grid():
    renderer = Renderer(model_tokenizer())
    for step in range(3):
        batch, grid = make_dialogue_batch(renderer, 1791, "seed", step, rank=0)
        again, _ = make_dialogue_batch(renderer, 1791, "seed", step, rank=0)
        other, other_grid = make_dialogue_batch(renderer, 1791, "seed", step, rank=1)
        assert grid == other_grid
        assert grid in GRIDS
        assert all(mx.array_equal(batch.arrays[name], again.arrays[name]) for name in batch.arrays)
        assert not mx.array_equal(batch.arrays["tokens"], other.arrays["tokens"])
        assert batch.tokens > 0.8 * TOKENS_PER_STEP
        places, patches = batch.arrays["places"], batch.arrays["patches"]
        assert places.size == patches.shape[0] * patches.shape[1] // 4
        assert np.unique(np.array(batch.arrays["tokens"].reshape(-1)[places])).tolist() == [renderer.media_pad]


def model_tokenizer():
    return Tokenizer.load(TEXT_MODEL)


@pytest.mark.sweep
def test_a_few_steps_of_both_parts_lower_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(vision_batches, "PICTURES_PER_STEP", 4)
    monkeypatch.setattr(vision_batches, "TOKENS_PER_STEP", 512)
    settings = Settings(str(tmp_path), str(TEXT_MODEL), minutes=600, vision=True, seed="test")
    trainer = VisionTrainer(settings, mx.distributed.init())
    batch, grid = make_picture_batch("test", 0, 0)

    def loss() -> float:
        p = trainer.parameters
        return float(probe_loss(p, features(p, batch.arrays["patches"], grid), batch.arrays["labels"]))

    before = loss()
    for _ in range(5):
        trainer._step()
    assert loss() < before
    text = text_parameters()
    kept = [name for name in text if not is_tower(name)]
    assert all(mx.array_equal(trainer.parameters[name], text[name]) for name in kept if not name.endswith("bias"))
    trainer.progress.seconds = 300 * 60.0
    record = trainer._step()
    assert record["part"] == 1
    assert any(not mx.array_equal(trainer.parameters[name], text[name]) for name in kept)
