"""Batches with pictures. Seed, step and rank determine a batch; all pictures of a batch have one grid."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import mlx.core as mx
import numpy as np
from PIL import Image

from kimi_mlx.images.prepared import PreparedImage, to_patches
from kimi_mlx.images.preprocessing import DEFAULT_PREPROCESSING
from scripts.mini.batches import TOKENS_PER_STEP, Batch, pack, to_arrays
from scripts.mini.labels import labels
from scripts.mini.picture_dialogues import picture_dialogue, text_dialogues
from scripts.mini.pictures import Picture, draw
from scripts.mini.render import Renderer, Row
from scripts.mini.scenes import GRIDS, Scene, make_scene
from scripts.mini.vision_architecture import MAX_PATCHES

ROW_LENGTH = 256
PICTURES_PER_STEP = 24  # per rank, while the tower is trained alone
TEXT_SHARE = 0.36  # share of the dialogues without a picture

Grid = tuple[int, int]


def grid_at(seed: str, step: int) -> Grid:
    """Return the grid of a step: the same on all ranks, so that none waits for another."""
    return Random(f"{seed} {step}").choice(GRIDS)


def prepare(picture: Picture) -> PreparedImage:
    """Draw a picture and cut it into patches, as kimi-mlx does with a file of it."""
    return to_patches([Image.fromarray(draw(picture))], MAX_PATCHES, DEFAULT_PREPROCESSING.patch_limit_on_one_side)


def picture_arrays(scenes: list[Scene], grid: Grid) -> dict[str, mx.array]:
    """Return normalised patches (N, P, 588) and labels (N * T, labels) of drawn scenes."""
    patches = np.stack([prepare(scene.picture).patches for scene in scenes])
    pixels = (patches.reshape(len(scenes), grid[0] * grid[1], -1).astype(np.float32) / 255 - 0.5) / 0.5
    marks = np.concatenate([labels(scene.picture, grid) for scene in scenes])
    return {"patches": mx.array(pixels), "labels": mx.array(marks)}


def make_picture_batch(seed: str, step: int, rank: int) -> tuple[Batch, Grid]:
    """Make the batch of a step and rank with pictures alone."""
    grid, rng = grid_at(seed, step), Random(f"{seed} {step} {rank}")
    arrays = picture_arrays([make_scene(rng, grid) for _ in range(PICTURES_PER_STEP)], grid)
    return Batch(arrays, PICTURES_PER_STEP * grid[0] * grid[1] // 4, 0), grid


def make_dialogue_batch(renderer: Renderer, pad: int, seed: str, step: int, rank: int) -> tuple[Batch, Grid]:
    """Make the batch of a step and rank with dialogues, most of them about a picture."""
    grid = grid_at(seed, step)
    rows = _rows(renderer, f"{seed} {step} {rank}", grid)
    bins = pack(rows, TOKENS_PER_STEP // ROW_LENGTH, ROW_LENGTH)
    batch = to_arrays(bins, ROW_LENGTH, pad)
    scenes = [row.scene for packed in bins for row in packed if row.scene is not None]
    (places,) = np.nonzero(np.array(batch.arrays["tokens"]).reshape(-1) == renderer.media_pad)
    arrays = batch.arrays | picture_arrays(scenes, grid) | {"places": mx.array(places.astype(np.int32))}
    return Batch(arrays, batch.tokens, ROW_LENGTH), grid


def _rows(renderer: Renderer, seed: str, grid: Grid) -> Iterator[Row]:
    rng = Random(seed)
    texts = text_dialogues(f"{seed} text")
    while True:
        if rng.random() < TEXT_SHARE:
            yield renderer.render(next(texts))
        else:
            scene = make_scene(rng, grid)
            yield renderer.render(picture_dialogue(scene, grid[0] * grid[1] // 4, rng), scene)
