"""Compare the vision tower alone with mlx-vlm's, in one process, on the same random weights and pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from kimi_mlx.bench.machine import OURS
from kimi_mlx.bench.measure import BenchmarkPlan
from kimi_mlx.bench.mlx_vlm_tower import EncodeImages, open_mlx_vlm_tower
from kimi_mlx.bench.pictures import make_picture
from kimi_mlx.bench.random_tower import build_tower, random_tower
from kimi_mlx.bench.results import Spread
from kimi_mlx.model.vision_config import VisionConfig
from kimi_mlx.units import format_count

MLX_VLM = "mlx-vlm"


@dataclass(frozen=True)
class TowerRow:
    """Time of one side's tower for the images of one request.

    Args:
        side: name of the side.
        images: number of images, encoded in one call.
        image_tokens: number of their tokens.
        encode_s: time of the call.
        tok_per_s: tokens per second.
    """

    side: str
    images: int
    image_tokens: int
    encode_s: Spread
    tok_per_s: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return the row for JSON."""
        return asdict(self)


def measure_towers(config: VisionConfig, plan: BenchmarkPlan, dtype: mx.Dtype) -> list[TowerRow]:
    """Measure both towers in turns, in an order that alternates.

    Args:
        config: dimensions of the tower.
        plan: numbers and size of the images, repetitions and seed.
        dtype: type to compute in.

    Raises:
        WeightsError: mlx-vlm refuses the weights.
    """
    tensors = random_tower(config, plan.seed)
    sides: dict[str, EncodeImages] = {
        OURS: build_tower(config, tensors, dtype),
        MLX_VLM: open_mlx_vlm_tower(config, tensors, dtype),
    }
    rows: list[TowerRow] = []
    for count in filter(None, plan.images):
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for repetition in range(-plan.warmup, plan.repeat):
            pictures = [
                make_picture(plan.image_size, (plan.seed, repetition + plan.warmup, number), plan.preprocessing)
                for number in range(count)
            ]
            patches = np.concatenate([picture.patches for picture in pictures])
            pixels = mx.array(patches).astype(mx.float32) / 127.5 - 1
            mx.eval(pixels)
            for name in list(sides)[:: 1 if repetition % 2 == 0 else -1]:
                elapsed_s = _time(sides[name], pixels, [picture.grid for picture in pictures])
                if repetition >= 0:
                    seconds[name].append(elapsed_s)
        tokens = count * plan.image_tokens
        rows += [
            TowerRow(name, count, tokens, Spread.of(times), Spread.of([tokens / elapsed_s for elapsed_s in times]))
            for name, times in seconds.items()
        ]
    return rows


def _time(encode: EncodeImages, pixels: mx.array, grids: Sequence[tuple[int, int, int]]) -> float:
    started = time.perf_counter()
    encode(pixels, grids)
    return time.perf_counter() - started


def ratio_lines(rows: Sequence[TowerRow]) -> list[str]:
    """Compare the speeds of both sides, in a line for each number of images."""
    lines: list[str] = []
    for count in dict.fromkeys(row.images for row in rows):
        speeds = {row.side: row.tok_per_s.median for row in rows if row.images == count}
        lines.append(
            f"tower alone, {format_count(count, 'image')}: kimi-mlx / mlx-vlm = {speeds[OURS] / speeds[MLX_VLM]:.2f}"
        )
    return lines
