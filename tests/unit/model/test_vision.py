"""The vision tower against its formulas in numpy, in parts and in packs, and input that does not fit."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.errors import VisionError
from kimi_mlx.model import vision_attention
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model
from kimi_mlx.model.image_rows import ImageRows, place_features, replace_rows
from kimi_mlx.model.sizes import vision_query_block
from kimi_mlx.model.vision import Encoding, merge
from kimi_mlx.model.vision_config import Grid
from kimi_mlx.model.vision_positions import add_positions, patch_rotations, resize_table, rotate
from kimi_mlx.weights.assemble import load_model
from tests.checkpoints import VISION, load_golden, make_pixels, write_checkpoint
from tests.examples import examples
from tests.vision_tower import vision_tower, vision_weights

GRIDS = ((1, 4, 6), (3, 2, 4), (1, 8, 8))
TOWER = vision_tower(VISION, vision_weights(VISION, 0))
PIXELS = mx.array(make_pixels(0, GRIDS, 14))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def cubic_sample(table: np.ndarray, y: float, x: float) -> np.ndarray:
    """Sample a table (height, width, D) at a point between its entries, with Keys' kernel and a = -0.75."""

    def kernel(d: float) -> float:
        d = abs(d)
        if d <= 1:
            return 1.25 * d**3 - 2.25 * d**2 + 1
        return -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0

    total = np.zeros(table.shape[2])
    for row in range(math.floor(y) - 1, math.floor(y) + 3):
        for column in range(math.floor(x) - 1, math.floor(x) + 3):
            entry = table[min(max(row, 0), table.shape[0] - 1), min(max(column, 0), table.shape[1] - 1)]
            total += kernel(y - row) * kernel(x - column) * entry
    return total


@pytest.mark.parametrize("size", [(4, 6), (8, 5), (12, 30), (1, 64)])
def test_the_position_table_is_sampled_at_the_centres_of_patches(size: tuple[int, int]) -> None:
    rows, columns = size
    table = random(8, 6, 5)
    resized = np.array(resize_table(mx.array(table), rows, columns))
    for row in range(rows):
        for column in range(columns):
            expected = cubic_sample(table, (row + 0.5) * 8 / rows - 0.5, (column + 0.5) * 6 / columns - 0.5)
            np.testing.assert_allclose(resized[row, column], expected, rtol=1e-5, atol=1e-5)


def test_a_table_of_the_size_of_the_grid_is_added_as_it_is() -> None:
    table = random(8, 6, 4)
    added = add_positions(mx.zeros((48, 4)), mx.array(table), (1, 8, 6))
    np.testing.assert_array_equal(np.array(added), table.reshape(48, 4))


def test_frames_of_a_chunk_get_sines_and_cosines() -> None:
    table = mx.zeros((2, 2, 4))
    frames = np.array(add_positions(mx.zeros((12, 4)), table, (3, 2, 2))).reshape(3, 4, 4)
    for frame in range(3):
        expected = [math.sin(frame), math.sin(frame / 100), math.cos(frame), math.cos(frame / 100)]
        np.testing.assert_allclose(frames[frame], [expected] * 4, rtol=1e-6, atol=1e-6)
    assert not np.array(add_positions(mx.zeros((4, 4)), table, (1, 2, 2))).any()


def test_pairs_turn_by_column_and_row_in_turn() -> None:
    grid, heads, size = (2, 4, 6), 3, 72
    x = random(48, heads, size)
    turned = np.array(rotate(mx.array(x), mx.array(patch_rotations(grid, size))))
    for patch in range(48):
        row, column = divmod(patch % 24, 6)
        for pair in range(size // 2):
            angle = (row if pair % 2 else column) * 10_000 ** (-4 * (pair // 2) / size)
            matrix = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
            expected = x[patch, :, 2 * pair : 2 * pair + 2] @ matrix.T
            np.testing.assert_allclose(turned[patch, :, 2 * pair : 2 * pair + 2], expected, rtol=1e-5, atol=1e-5)


def test_neighbours_are_merged_and_frames_averaged() -> None:
    x = random(3 * 4 * 6, 5)
    merged = np.array(merge(mx.array(x), (3, 4, 6), (2, 2)))
    mean = x.reshape(3, 4, 6, 5).mean(axis=0)
    for index in range(6):
        row, column = 2 * (index // 3), 2 * (index % 3)
        corners = [mean[row, column], mean[row, column + 1], mean[row + 1, column], mean[row + 1, column + 1]]
        np.testing.assert_allclose(merged[index], corners, rtol=1e-5, atol=1e-6)


def test_images_in_one_call_do_not_see_each_other() -> None:
    together = TOWER(PIXELS, GRIDS)
    start = first = 0
    for grid in GRIDS:
        patches, tokens = math.prod(grid), TOWER.config.num_tokens(grid)
        alone = TOWER(PIXELS[start : start + patches], [grid])
        np.testing.assert_allclose(together[first : first + tokens], alone, rtol=1e-4, atol=1e-5)
        start, first = start + patches, first + tokens
    assert first == together.shape[0]


def test_frames_of_a_chunk_see_each_other() -> None:
    grid = (2, 4, 4)
    pixels = np.array(make_pixels(1, (grid,), 14))
    features = TOWER(mx.array(pixels), [grid])
    swapped = TOWER(mx.array(np.concatenate([pixels[16:], pixels[:16]])), [grid])
    assert mx.abs(features - swapped).max() > 0.001  # the order of frames matters, although they are averaged
    halves = [TOWER(mx.array(half), [(1, 4, 4)]) for half in (pixels[:16], pixels[16:])]
    assert mx.abs(features - (halves[0] + halves[1]) / 2).max() > 0.01


def test_bytes_and_normalized_floats_are_the_same() -> None:
    floats = (PIXELS.astype(mx.float32) / 255 - 0.5) / 0.5
    np.testing.assert_array_equal(TOWER(floats, mx.array(GRIDS)), TOWER(PIXELS, mx.array(GRIDS)))


@pytest.mark.parametrize("budget", [0, 5 * 10**6, 8 * 10**6, None])
def test_encoding_in_parts_gives_the_same_features(budget: int | None) -> None:
    encoding = Encoding(TOWER, PIXELS, GRIDS, budget)
    expected_parts = {0: 2, 5 * 10**6: 2, 8 * 10**6: 1, None: 1}[budget]
    steps = [encoding.step() for _ in range(encoding.num_parts)]
    assert steps == [False] * (expected_parts - 1) + [True]
    np.testing.assert_array_equal(encoding.features, TOWER(PIXELS, GRIDS))


@pytest.mark.parametrize("budget", [0, 10**6])
def test_a_large_image_is_encoded_in_slices_of_a_block(budget: int) -> None:
    grid = (2, 12, 10)
    pixels = mx.array(make_pixels(3, (grid,), 14))
    encoding = Encoding(TOWER, pixels, [grid], budget)
    steps = [encoding.step() for _ in range(encoding.num_parts)]
    assert steps == [False] * 5 + [True]  # two blocks of three slices with 80 patches each
    np.testing.assert_allclose(encoding.features, TOWER(pixels, [grid]), rtol=1e-5, atol=1e-5)


def test_parts_run_in_other_threads() -> None:
    encoding = Encoding(TOWER, PIXELS, GRIDS, 0)
    for _ in range(encoding.num_parts):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(encoding.step).result()
    np.testing.assert_array_equal(encoding.features, TOWER(PIXELS, GRIDS))


@pytest.mark.parametrize(
    ("shape", "grids", "message"),
    [
        ((24, 3, 14, 14), [(1, 4, 4)], r"\(24, 3, 14, 14\), but grids \[\(1, 4, 4\)\] need \(16, 3, 14, 14\)"),
        ((16, 588), [(1, 4, 4)], r"\(16, 588\), but"),
        ((0, 3, 14, 14), [], r"\(0, 3, 14, 14\), but grids \[\]"),
        ((15, 3, 14, 14), [(1, 3, 5)], "3 x 5 patches"),
        ((80, 3, 14, 14), [(5, 4, 4)], "5 frames"),
    ],
)
def test_patches_that_do_not_fit_are_refused(shape: tuple[int, ...], grids: list[Grid], message: str) -> None:
    with pytest.raises(VisionError, match=message):
        TOWER(mx.zeros(shape), grids)


def test_queries_are_in_blocks_of_limited_size() -> None:
    assert vision_query_block(16, 16_384) == 32
    assert vision_query_block(4, 100) == 100
    assert vision_query_block(16, 10**8) == 1


@given(length=st.integers(1, 40), block=st.integers(1, 45))
@examples(30)
def test_blocks_of_queries_give_the_attention_of_all(length: int, block: int) -> None:
    q, k, v = (mx.array(random(1, 2, length, 8, seed=seed)) for seed in range(3))
    scores = np.array(q[0]) @ np.array(k[0]).swapaxes(1, 2) / math.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ np.array(v[0])
    np.testing.assert_allclose(vision_attention.blockwise(q, k, v, block)[0], expected, rtol=1e-4, atol=1e-5)


def test_attention_does_not_store_all_scores() -> None:
    q, k, v = (mx.array(random(1, 4, 1024, 8, seed=seed)) for seed in range(3))
    mx.eval(q, k, v)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(vision_attention.blockwise(q, k, v, 8))
    assert mx.get_peak_memory() - before < 4 * 1024 * 1024 * 4 / 4  # a quarter of the scores


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = write_checkpoint(tmp_path_factory.mktemp("k2.5"), load_golden("k2.5").config, 0)
    return load_model(folder, load_config(folder), mx.float32)


def test_a_model_with_a_tower_runs_in_another_thread(model: Model) -> None:
    tokens = mx.array([[1, 187, 187, 2]])
    pixels = mx.array(make_pixels(0, ((1, 2, 4),), 14))
    mx.eval(tokens, pixels)

    def logits() -> np.ndarray:
        return np.array(model(tokens, pixel_values=pixels, grid_thw=[(1, 2, 4)]))

    with ThreadPoolExecutor(1) as thread:
        np.testing.assert_array_equal(thread.submit(logits).result(), logits())


@pytest.mark.parametrize("tokens", [[[1, 2]], [[187, 1]], [[187, 187, 187]]])
def test_placeholders_that_are_not_as_many_as_features_are_refused(model: Model, tokens: list[list[int]]) -> None:
    count = tokens[0].count(187)
    with pytest.raises(VisionError, match=rf"have {count} placeholders of images \(id 187\), .* have 2 features"):
        model(mx.array(tokens), pixel_values=mx.zeros((8, 3, 14, 14)), grid_thw=[(1, 2, 4)])


def test_several_sequences_take_no_images(model: Model) -> None:
    with pytest.raises(VisionError, match="need one sequence, but there are 2"):
        model(mx.array([[187], [187]]), pixel_values=mx.zeros((8, 3, 14, 14)), grid_thw=[(1, 2, 4)])


def test_a_model_without_a_tower_takes_no_images(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, load_golden("k2").config, 0)
    model = load_model(folder, load_config(folder), mx.float32)
    with pytest.raises(VisionError, match="no vision tower"):
        model.image_features(mx.zeros((4, 3, 14, 14)), [(1, 2, 2)])


def test_features_replace_rows_at_both_ends_and_between() -> None:
    x = mx.array(random(1, 9, 3))
    rows = [ImageRows(0, mx.ones((2, 3))), ImageRows(2, 2 * mx.ones((1, 3))), ImageRows(6, 3 * mx.ones((3, 3)))]
    replaced = np.array(replace_rows(x, rows))
    np.testing.assert_array_equal(replaced[0, :, 0][[0, 1, 2, 6, 7, 8]], [1, 1, 2, 3, 3, 3])
    np.testing.assert_array_equal(replaced[:, 3:6], x[:, 3:6])
    assert replace_rows(x, ()) is x


def test_runs_of_placeholders_get_features_in_order() -> None:
    features = mx.arange(5).reshape(5, 1)
    rows = place_features(mx.array([[9, 9, 1, 9, 1, 1, 9, 9]]), 9, features)
    assert [(part.start, part.rows[:, 0].tolist()) for part in rows] == [(0, [0, 1]), (3, [2]), (6, [3, 4])]
    assert place_features(mx.array([[1, 2]]), 9, features[:0]) == []
