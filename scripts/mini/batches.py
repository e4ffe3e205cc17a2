"""Pack rendered dialogues into batches. Seed, step and rank determine a batch, so a run can resume."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import mlx.core as mx
import numpy as np

from scripts.mini.dialogues import Dialogue, generate, stream
from scripts.mini.render import Renderer, Row

# Per part of the training: row length -> share of the steps with rows of this length.
ROW_LENGTHS: tuple[dict[int, float], ...] = (
    {128: 0.75, 256: 0.25},
    {128: 0.45, 256: 0.43, 512: 0.12},
    {128: 0.3, 256: 0.46, 512: 0.12, 1024: 0.12},
)
TOKENS_PER_STEP = 2048  # per rank
MAX_MISFITS = 6  # number of dialogues that fit nowhere, after which packing ends


@dataclass(frozen=True)
class Batch:
    """Arguments of `model.loss`, and the number of tokens that are not padding."""

    arrays: dict[str, mx.array]
    tokens: int
    row_length: int


def pack(rows: Iterator[Row], count: int, length: int) -> list[list[Row]]:
    """Fill `count` bins of `length` tokens, each row where it leaves the least space."""
    bins: list[list[Row]] = [[] for _ in range(count)]
    free = [length] * count
    misfits = 0
    for row in rows:
        if len(row.ids) > length:
            continue
        fitting = [index for index in range(count) if free[index] >= len(row.ids)]
        if not fitting:
            misfits += 1
            if misfits == MAX_MISFITS:
                break
            continue
        best = min(fitting, key=lambda index: free[index])
        bins[best].append(row)
        free[best] -= len(row.ids)
    return bins


def to_arrays(bins: list[list[Row]], length: int, pad: int) -> Batch:
    """Lay out bins as tokens, segments and the supervised positions with their targets."""
    tokens = np.full((len(bins), length), pad, dtype=np.int32)
    segments = np.full((len(bins), length), -1, dtype=np.int32)
    positions: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    filled = 0
    for index, rows in enumerate(bins):
        start = 0
        for number, row in enumerate(rows):
            end = start + len(row.ids)
            tokens[index, start:end] = row.ids
            segments[index, start:end] = number
            for offset in range(1, len(row.ids)):
                if row.weights[offset]:
                    positions.append(index * length + start + offset - 1)
                    targets.append(row.ids[offset])
                    weights.append(row.weights[offset])
            start = end
        filled += start
    arrays = {
        "tokens": mx.array(tokens),
        "segments": mx.array(segments),
        "positions": mx.array(np.array(positions, dtype=np.int32)),
        "targets": mx.array(np.array(targets, dtype=np.int32)),
        "weights": mx.array(np.array(weights, dtype=np.float32)),
    }
    return Batch(arrays, filled, length)


def make_batch(renderer: Renderer, pad: int, seed: str, step: int, rank: int, part: int) -> Batch:
    """Make the batch of a step and rank; the same arguments give the same batch."""
    # All ranks use the same row length, so that none waits for another.
    lengths = ROW_LENGTHS[part]
    length = Random(f"{seed} {step}").choices(list(lengths), list(lengths.values()))[0]
    rng_seed = f"{seed} {step} {rank}"
    dialogues = stream(rng_seed, part, 160 if length <= 256 else length)
    if length > 256:
        dialogues = _led_by_long_texts(
            Random(rng_seed + " long"), length, TOKENS_PER_STEP // length, stream(rng_seed, part, 160)
        )
    rows = (renderer.render(dialogue) for dialogue in dialogues)
    return to_arrays(pack(rows, TOKENS_PER_STEP // length, length), length, pad)


def _led_by_long_texts(rng: Random, length: int, count: int, rest: Iterator[Dialogue]) -> Iterator[Dialogue]:
    for _ in range(count):
        yield generate("retrieval", rng, length)
    yield from rest
