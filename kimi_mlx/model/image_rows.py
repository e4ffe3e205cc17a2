"""Features of images in the place of token embeddings.

Letters: L tokens of a step, D hidden_size, T features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import numpy as np

from kimi_mlx.errors import VisionError


@dataclass(frozen=True)
class ImageRows:
    """Features that replace the embeddings of consecutive tokens.

    Args:
        start: index of the first token among the tokens of the step.
        rows: (k, D), the features of tokens start .. start + k. They should be evaluated: arrays that another thread
            has made may stall a step.
    """

    start: int
    rows: mx.array


def replace_rows(x: mx.array, features: Sequence[ImageRows]) -> mx.array:
    """Replace embeddings by features.

    Args:
        x: (1, L, D), embeddings of the tokens of a step.
        features: features in the order of their tokens, without overlap.

    Returns:
        (1, L, D) in x's dtype.
    """
    parts: list[mx.array] = []
    end = 0
    for feature in features:
        stop = feature.start + feature.rows.shape[0]
        assert end <= feature.start <= stop <= x.shape[1], (end, feature.start, stop, x.shape)
        parts += [x[:, end : feature.start], feature.rows.astype(x.dtype)[None]]
        end = stop
    return mx.concatenate([*parts, x[:, end:]], axis=1) if parts else x


def place_features(tokens: mx.array, placeholder: int, features: mx.array) -> list[ImageRows]:
    """Return the rows of each run of placeholders.

    Args:
        tokens: (1, L), in which each placeholder stands for one feature, in order.
        placeholder: token id of placeholders.
        features: (T, D).

    Raises:
        VisionError: the number of placeholders is not T, or there are several sequences.
    """
    if tokens.shape[0] != 1:
        raise VisionError(f"images need one sequence, but there are {tokens.shape[0]}")
    positions = np.flatnonzero(np.array(tokens[0]) == placeholder)
    if len(positions) != features.shape[0]:
        raise VisionError(
            f"the tokens have {len(positions)} placeholders of images (id {placeholder}), but the images have "
            f"{features.shape[0]} features"
        )
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
    bounds = [*map(int, starts), len(positions)]
    return [ImageRows(int(positions[start]), features[start:end]) for start, end in pairwise(bounds)]
