"""All kinds of attention agree: NumPy's, latent over blocks of keys, latent in groups, and by heads."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.model import attention, numpy_attention
from kimi_mlx.model.attention import Attention
from kimi_mlx.model.attention_cost import AttentionCost
from kimi_mlx.model.batch_layout import BatchLayout
from kimi_mlx.model.cache import LatentCache, SharedRows
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.device_traits import METAL_TUNING
from kimi_mlx.model.rope import Rope
from kimi_mlx.model.sizes import SCORES_MAX
from kimi_mlx.weights.assemble import load_model
from tests.examples import examples

FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"

LENGTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=5).filter(
    lambda lengths: any(length for _, length in lengths)
)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


def attend(
    model: Model, lengths: list[tuple[int, int]], *, is_latent: bool, in_numpy: bool, scores_max: int
) -> np.ndarray:
    """Return the attention of a layer for random inputs and caches, computed in one way."""
    layer: Attention = model.layers[1].self_attn
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    caches = []
    for number, (offset, _) in enumerate(lengths):
        caches.append(LatentCache())
        caches[-1].append(mx.random.normal((1, 1, offset, width), key=mx.random.key(number)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttentionCost, "is_latent", lambda cost, offset, length: is_latent)
        patch.setattr(attention, "uses_numpy", lambda *args: in_numpy)
        patch.setattr(attention, "SCORES_MAX", scores_max)
        patch.setattr(numpy_attention, "NUMPY_ROW_BLOCK", 24)
        patch.setattr(numpy_attention, "NUMPY_KEY_BLOCK", 64)
        layout = BatchLayout(Rope(model.config), lengths, AttentionCost(layer.shape, METAL_TUNING))
        x = mx.random.normal((1, layout.length, model.config.hidden_size), key=mx.random.key(99))
        return np.array(layer(x, caches, layout, layout, lambda name, value: None))


@examples(12)
@given(lengths=LENGTHS)
def test_every_path_gives_the_same_result(model: Model, lengths: list[tuple[int, int]]) -> None:
    by_heads = attend(model, lengths, is_latent=False, in_numpy=False, scores_max=SCORES_MAX)
    for in_numpy, scores_max in ((True, SCORES_MAX), (False, SCORES_MAX), (False, 1)):
        latent = attend(model, lengths, is_latent=True, in_numpy=in_numpy, scores_max=scores_max)
        np.testing.assert_allclose(latent, by_heads, rtol=1e-4, atol=2e-5)


def test_numpy_attends_each_sequence_of_a_batch_to_its_own_keys() -> None:
    q = mx.random.normal((2, 5, 3, 24), key=mx.random.key(1))
    keys = mx.random.normal((2, 1, 90, 24), key=mx.random.key(2))[:, :, :70]
    got = numpy_attention.attend(q, [numpy_attention.LatentQueries(0, 5, keys)], 16)
    scores = q.swapaxes(1, 2) @ keys.swapaxes(-1, -2)  # (2, 3, 5, 70)
    visible = mx.arange(70) <= mx.arange(65, 70)[:, None]
    weights = mx.softmax(mx.where(visible, scores, mx.array(-mx.inf)), axis=-1)
    expected = (weights @ keys[..., :16]).swapaxes(1, 2)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-5, atol=1e-6)


@examples(12)
@given(lengths=LENGTHS, prefixes=st.lists(st.integers(0, 2), min_size=5, max_size=5))
def test_attention_to_shared_rows_equals_that_to_copies(
    model: Model, lengths: list[tuple[int, int]], prefixes: list[int]
) -> None:
    layer: Attention = model.layers[1].self_attn
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    shared = [SharedRows(mx.random.normal((1, 1, 90 * number, width), key=mx.random.key(number))) for number in (1, 2)]
    results = []
    for is_shared, in_numpy, scores_max in (
        (False, False, SCORES_MAX),
        (True, True, SCORES_MAX),
        (True, False, SCORES_MAX),
        (True, False, 1),
    ):
        caches, counts = [], []
        for number, ((offset, length), prefix) in enumerate(zip(lengths, prefixes, strict=False)):
            cache = LatentCache()
            if prefix:
                rows = shared[prefix - 1]
                cache.append(rows.keys)
                if is_shared:
                    cache.copy(cache, cache.offset, rows)
            cache.append(mx.random.normal((1, 1, offset, width), key=mx.random.key(10 + number)))
            caches.append(cache)
            counts.append((cache.offset, length))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "uses_numpy", lambda *args, in_numpy=in_numpy: in_numpy)
            patch.setattr(attention, "SCORES_MAX", scores_max)
            patch.setattr(attention, "latent_key_block", lambda rows: 64)
            patch.setattr(numpy_attention, "NUMPY_ROW_BLOCK", 24)
            patch.setattr(numpy_attention, "NUMPY_KEY_BLOCK", 64)
            cost = AttentionCost(layer.shape, METAL_TUNING)
            layout = BatchLayout(Rope(model.config), counts, cost, shared=[cache.shared for cache in caches])
            x = mx.random.normal((1, layout.length, model.config.hidden_size), key=mx.random.key(99))
            results.append(np.array(layer(x, caches, layout, layout, lambda name, value: None)))
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-4, atol=2e-5)
