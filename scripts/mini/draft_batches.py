"""Pack samples of the draft model into batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import mlx.core as mx
import numpy as np

from scripts.mini.draft_data import ROW_LENGTH, ROWS, Sample
from scripts.mini.model import Parameters


def batches(samples: Sequence[Sample], seed: int) -> Iterator[list[list[Sample]]]:
    """Yield the rows of one pass over the samples in random order, ROWS at a time."""
    order = list(samples)
    Random(seed).shuffle(order)
    rows: list[list[Sample]] = [[]]
    for sample in order:
        if sum(len(other.ids) for other in rows[-1]) + len(sample.ids) > ROW_LENGTH:
            if len(rows) == ROWS:
                yield rows
                rows = []
            rows.append([])
        rows[-1].append(sample)
    yield rows


def to_arrays(rows: Sequence[Sequence[Sample]], embedding: mx.array, head: mx.array, drafted: np.ndarray) -> Parameters:
    """Return the batch of `draft_model.loss`.

    Args:
        rows: samples of each row.
        embedding: (vocab_size, D), kimi-mini's.
        head: (vocab_size, D), kimi-mini's.
        drafted: (V,), tokens that can be drafted.
    """
    size = (len(rows), ROW_LENGTH)
    example = rows[0][0]
    following, segments = np.zeros(size, np.int32), np.full(size, -1, np.int32)
    weights, next_final = np.zeros(size, np.float32), np.zeros((*size, example.final.shape[1]), np.float32)
    captured = np.zeros((*size, example.captured.shape[1]), np.float32)
    for row, samples in enumerate(rows):
        start = 0
        for number, sample in enumerate(samples):
            stop = start + len(sample.ids)
            segments[row, start:stop] = number
            captured[row, start:stop] = sample.captured
            following[row, start : stop - 1] = sample.ids[1:]
            next_final[row, start : stop - 1] = sample.final[1:]
            weights[row, start + max(sample.answer_start - 2, 0) : stop - 2] = 1
            start = stop
    final = mx.array(next_final)
    likeliest = np.array(mx.argmax(final @ head.T, axis=-1))
    return {
        "captured": mx.array(captured),
        "embeddings": embedding[mx.array(following)],
        "segments": mx.array(segments),
        "scores": final @ head[mx.array(drafted)].T,
        "weights": mx.array(weights * np.isin(likeliest, drafted)),
    }
