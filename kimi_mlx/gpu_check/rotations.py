"""Both forms of the rotary embedding against its formula in float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from kimi_mlx.gpu_check.context import Context
from kimi_mlx.gpu_check.random_model import model_config
from kimi_mlx.model.rope import ComplexRotation, FastRotation, Rope

RANGES = {
    "start": [(0, 9)],
    "one": [(4095, 1)],
    "far": [(100_000, 70)],
    "several": [(7, 1), (1000, 1), (30_000, 1), (3, 12)],
}
LIMITS = {mx.float32: 5e-3, mx.bfloat16: 2e-2}
"""float32 angles at position 100,000 are exact to 0.004."""


def check(context: Context) -> None:
    """Rotate random queries at several ranges of positions."""
    rope = Rope(model_config(context.sizes))
    mx.eval(rope.periods)
    for label, ranges in RANGES.items():
        positions = np.concatenate([np.arange(start, start + length) for start, length in ranges])
        x = mx.random.normal((1, 3, len(positions), rope.dims), key=mx.random.key(4))
        for dtype, limit in LIMITS.items():
            rounded = x.astype(dtype)
            expected = _formula(rope, np.array(rounded.astype(mx.float32)), positions)
            for form in (FastRotation, ComplexRotation):
                with context.on_device():
                    actual = form(rope, ranges)(rounded)
                    mx.eval(actual)
                name = f"{form.__name__} {label} {str(dtype).removeprefix('mlx.core.')}"
                context.compare(name, actual, mx.array(expected.astype(np.float32)), limit)


def _formula(rope: Rope, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rotate the pairs of the last dimension in float64: (B, H, L, P)."""
    angles = positions[:, None] / np.array(rope.periods).astype(np.float64)
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rope.magnitude * np.cos(angles), rope.magnitude * np.sin(angles)
    even, odd = pairs[..., 0], pairs[..., 1]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
