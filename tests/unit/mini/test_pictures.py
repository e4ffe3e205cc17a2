"""Pictures of kimi-mini-vl's training: reproducible, as described, with true answers."""

from __future__ import annotations

import io
from itertools import islice
from random import Random

import numpy as np
import pytest
from PIL import Image

from kimi_mlx.images.prepare import prepare_image
from kimi_mlx.images.preprocessing import Preprocessing
from scripts.mini.labels import LABELS, labels
from scripts.mini.pictures import COLORS, SHAPES, Item, Picture, draw
from scripts.mini.scenes import (
    COUNTS,
    GRIDS,
    KIND_SHARES,
    SIDE_ANSWERS,
    Scene,
    caption,
    make_scene,
    scenes,
)
from scripts.mini.vision_architecture import MAX_PATCHES
from scripts.mini.vision_batches import prepare
from scripts.mini.vision_export import SHIPPED

WHITE = (255, 255, 255)


def one(shape: str, color: str = "red", x: float = 56, y: float = 40, radius: float = 30) -> Picture:
    return Picture(112, 112, WHITE, (Item(shape, color, x, y, radius, COLORS[color]),))


def names_of(item: Item) -> tuple[str, str]:
    return item.shape, f"{item.color} {item.shape}"


def first(kind: str, number: int = 20) -> list[tuple[Scene, tuple[int, int]]]:
    grids = [GRIDS[index % len(GRIDS)] for index in range(number)]
    return [(next(scenes(f"{kind} {index}", grid, kind)), grid) for index, grid in enumerate(grids)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_filled_and_stays_inside_its_radius(shape: str):
    pixels = draw(one(shape)).astype(int)
    colored = np.abs(pixels - WHITE).sum(axis=-1) > 0
    y, x = np.nonzero(colored)
    assert pixels[40, 56].tolist() == list(COLORS["red"])
    assert np.hypot(x + 0.5 - 56, y + 0.5 - 40).max() < 30 * 1.05 + 1.5
    assert 0.3 < colored.sum() / (np.pi * 30**2) < 0.85


def test_shapes_differ_and_edges_are_smooth():
    drawn = [draw(one(shape)) for shape in SHAPES]
    assert len({pixels.tobytes() for pixels in drawn}) == len(SHAPES)
    green = drawn[0][..., 1]
    assert len(np.unique(green)) > 10


@pytest.mark.parametrize("kind", KIND_SHARES)
def test_the_same_seed_gives_the_same_scenes(kind: str):
    one_run, again = (list(islice(scenes("seed", (8, 10), kind), 5)) for _ in range(2))
    assert one_run == again
    assert [scene.kind for scene in one_run] == [kind] * 5
    assert one_run != list(islice(scenes("other", (8, 10), kind), 5))


def test_answers_follow_from_what_is_drawn():
    for scene, _ in first("same"):
        items = scene.picture.items
        assert len({(item.color, item.shape) for item in items}) == 1
        assert scene.exchanges["count"].answer == f"{COUNTS[len(items)]}."
        assert items[0].color in scene.exchanges["what"].answer.lower()
        assert items[0].shape in scene.exchanges["what"].answer
    for scene, _ in first("side"):
        (item,), picture = scene.picture.items, scene.picture
        x, y = item.x / picture.width - 0.5, item.y / picture.height - 0.5
        side = "middle" if max(abs(x), abs(y)) < 0.1 else None
        side = side or (("left" if x < 0 else "right") if abs(x) > abs(y) else ("top" if y < 0 else "bottom"))
        assert scene.exchanges["side"].answer in [SIDE_ANSWERS[side].format(name) for name in names_of(item)]
    for scene, _ in first("number"):
        assert scene.picture.number is not None
        assert scene.exchanges["number"].answer == f"{scene.picture.number.value}."


def test_captions():
    def picture(*names: str) -> Picture:
        items = (name.split() for name in names)
        return Picture(112, 112, WHITE, tuple(Item(shape, color, 0, 0, 9, WHITE) for color, shape in items))

    assert caption(picture("red circle")) == "A red circle."
    assert caption(picture("red circle", "red circle")) == "Two red circles."
    assert caption(picture("red circle", "blue star")) == "A red circle and a blue star."


def test_shapes_do_not_touch():
    for kind in ("same", "pair"):
        for scene, _ in first(kind):
            items = scene.picture.items
            for index, item in enumerate(items):
                for other in items[:index]:
                    assert np.hypot(item.x - other.x, item.y - other.y) > item.radius + other.radius


@pytest.mark.parametrize("kind", KIND_SHARES)
def test_patches_equal_those_of_the_real_preprocessing(kind: str):
    preprocessing = Preprocessing.load(SHIPPED)
    assert preprocessing.in_patch_limit == MAX_PATCHES
    for scene, grid in first(kind, 5):
        file = io.BytesIO()
        Image.fromarray(draw(scene.picture)).save(file, "PNG")
        prepared = prepare_image(file.getvalue(), "test", preprocessing=preprocessing)
        assert prepared.grid == (1, *grid)
        assert np.array_equal(prepared.patches, prepare(scene.picture).patches)


def test_labels_are_where_the_shapes_are():
    for kind in KIND_SHARES:
        for scene, grid in first(kind, 10):
            marks = labels(scene.picture, grid)
            assert marks.shape == (grid[0] * grid[1] // 4, len(LABELS))
            assert np.all(marks < list(LABELS.values()))
            centers = marks[:, list(LABELS).index("center")].sum()
            most = 2 if kind == "number" else len(scene.picture.items)
            assert 1 <= centers <= most  # two shapes may share a token


def test_every_grid_is_within_the_limit_for_some_size():
    rng = Random(0)
    for grid in GRIDS:
        scene = make_scene(rng, grid)
        assert (scene.picture.height // 14) * (scene.picture.width // 14) <= MAX_PATCHES
