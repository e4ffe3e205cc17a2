"""Positions of patches: the table that is added to them, and the rotary embedding of their queries and keys.

Letters: t frames, h rows and w columns of an image in patches, P patches of an image (t * h * w), Q size of a head,
D vt_hidden_size.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kimi_mlx.model.vision_config import Grid

THETA = 10_000.0
"""Base of the frequencies, of frames and of the rotary embedding."""

CUBIC_A = -0.75
"""Coefficient of the cubic convolution kernel, as in torch's `interpolate`."""


def add_positions(x: mx.array, table: mx.array, grid: Grid) -> mx.array:
    """Add to each patch its row of the position table, and in a chunk of a video the row of its frame.

    Args:
        x: (P, D), patches in row-major order, frame after frame.
        table: (height, width, D), resized to the grid.
        grid: grid of the image.

    Returns:
        (P, D), same dtype.
    """
    frames, rows, columns = grid
    positions = resize_table(table.astype(mx.float32), rows, columns).reshape(1, rows * columns, -1)
    if frames > 1:
        positions = positions.astype(table.dtype) + mx.array(frame_rows(frames, x.shape[-1]))[:, None]
    return x + positions.reshape(-1, x.shape[-1]).astype(x.dtype)


def resize_table(table: mx.array, rows: int, columns: int) -> mx.array:
    """Resize a table (height, width, D) with bicubic interpolation, without antialiasing: (rows, columns, D).

    A table that has the size already is unchanged, because its weights are 0 and 1.
    """
    height, width, hidden = table.shape
    by_row = mx.array(cubic_weights(height, rows)) @ table.reshape(height, width * hidden)
    return mx.array(cubic_weights(width, columns)) @ by_row.reshape(rows, width, hidden)


def cubic_weights(size: int, new_size: int) -> np.ndarray:
    """Return the matrix (new_size, size) of bicubic interpolation along an axis, float32.

    Centres of pixels are at halves (`align_corners` false); samples beyond the border repeat the border.
    Source: Keys 1981, cubic convolution interpolation; torch.nn.functional.interpolate.
    """
    centres = (np.arange(new_size) + 0.5) * (size / new_size) - 0.5
    first = np.floor(centres)
    fraction = centres - first
    weights = np.zeros((new_size, size))
    for tap in range(-1, 3):
        samples = np.clip(first + tap, 0, size - 1).astype(np.int64)
        np.add.at(weights, (np.arange(new_size), samples), _cubic_kernel(np.abs(fraction - tap)))
    return weights.astype(np.float32)


def _cubic_kernel(distance: np.ndarray) -> np.ndarray:
    a, d = CUBIC_A, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((d - 5) * d + 8) * d * a - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def frame_rows(frames: int, hidden: int) -> np.ndarray:
    """Return the row of each frame, (frames, hidden) float32: sines of frame * frequency, then cosines."""
    angles = np.arange(frames)[:, None] * THETA ** (-np.arange(0, hidden, 2) / hidden)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def patch_rotations(grid: Grid, head_dim: int) -> np.ndarray:
    """Return the rotation of each pair of a head, (P, Q / 2) complex64; all frames have the same.

    A head has Q / 4 frequencies. Pair 2 * i turns by the column times frequency i, pair 2 * i + 1 by the row.
    """
    frames, rows, columns = grid
    frequencies = THETA ** (-4 * np.arange(head_dim // 4) / head_dim)
    angles = np.empty((rows, columns, head_dim // 4, 2))
    angles[..., 0] = (np.arange(columns)[:, None] * frequencies)[None]
    angles[..., 1] = (np.arange(rows)[:, None] * frequencies)[:, None]
    return np.tile(np.exp(1j * angles).astype(np.complex64).reshape(rows * columns, -1), (frames, 1))


def rotate(x: mx.array, rotations: mx.array) -> mx.array:
    """Rotate adjacent pairs of the last dimension in float32.

    Args:
        x: (P, ..., Q).
        rotations: (P, Q / 2) complex64.
    """
    pairs = x.astype(mx.float32).view(mx.complex64)  # (P, ..., Q / 2)
    axes = (1,) * (x.ndim - 2)
    turned = pairs * rotations.reshape(x.shape[0], *axes, -1)
    return turned.view(mx.float32).astype(x.dtype)
