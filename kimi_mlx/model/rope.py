"""Rotary position embedding of the K2 family: interleaved pairs, YaRN frequencies.

Letters: B batch, H heads, L length, P qk_rope_head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from kimi_mlx.model.config import DecoderConfig
from kimi_mlx.model.config_rope import YarnScaling, yarn_mscale
from kimi_mlx.model.device import is_gpu


class Rope:
    """Rotates the last dimension by position. It has no parameters.

    Source: YaRN (https://arxiv.org/abs/2309.00071), with the correction range and mscale of DeepSeek-V3's code.
    """

    def __init__(self, config: DecoderConfig):
        self.dims = config.qk_rope_head_dim
        self.periods = wavelengths(self.dims, config.rope_theta, config.yarn)
        yarn = config.yarn
        self.magnitude = (
            1.0
            if yarn is None
            else yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        )

    def at(self, ranges: Sequence[tuple[int, int]]) -> Rotation:
        """Return the rotation for concatenated ranges of positions: (first position, length) of each."""
        return FastRotation(self, ranges) if is_gpu() else ComplexRotation(self, ranges)


class FastRotation:
    """Rotation with one kernel per array, which also computes the angles."""

    def __init__(self, rope: Rope, ranges: Sequence[tuple[int, int]]):
        self._rope, self._is_single = rope, len(ranges) == 1
        self._offset = ranges[0][0] if self._is_single else token_positions(ranges)

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x, (B, H, L, P); B is 1 if there are several ranges."""
        if self._rope.magnitude != 1.0:
            x = x * self._rope.magnitude
        return self._rotate(x) if self._is_single else self._rotate(x.swapaxes(0, 2)).swapaxes(0, 2)

    def _rotate(self, x: mx.array) -> mx.array:
        """Call the kernel, which takes one offset per batch element: with several ranges each token is an element."""
        rope = self._rope
        return mx.fast.rope(
            x, rope.dims, traditional=True, base=None, scale=1.0, offset=self._offset, freqs=rope.periods
        )


class ComplexRotation:
    """Rotation with one complex product per array; cosines and sines are computed once per step.

    On the CPU mx.fast.rope runs about twenty kernels, including cosines and sines, twice per layer.
    """

    def __init__(self, rope: Rope, ranges: Sequence[tuple[int, int]]):
        angles = token_positions(ranges).astype(mx.float32)[:, None] * (1.0 / rope.periods)  # (L, P / 2)
        self._rotations = rope.magnitude * (mx.cos(angles) + 1j * mx.sin(angles))

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x, (B, H, L, P)."""
        pairs = x.astype(mx.float32).view(mx.complex64)  # (B, H, L, P / 2)
        return (pairs * self._rotations).view(mx.float32).astype(x.dtype)


Rotation = FastRotation | ComplexRotation


def consecutive_ranges(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return positions as ranges of consecutive ones: (first position, length) of each."""
    ranges: list[tuple[int, int]] = []
    for position in positions:
        first, length = ranges[-1] if ranges else (position, 0)
        if position == first + length:
            ranges[-1:] = [(first, length + 1)]
        else:
            ranges.append((position, 1))
    return ranges


def token_positions(ranges: Sequence[tuple[int, int]]) -> mx.array:
    """Return concatenated ranges of positions, (L,) int32."""
    if len(ranges) == 1:
        (start, length), *_ = ranges
        return mx.arange(start, start + length)
    return mx.array(np.concatenate([np.arange(start, start + length, dtype=np.int32) for start, length in ranges]))


def wavelengths(dims: int, theta: float, yarn: YarnScaling | None) -> mx.array:
    """Return positions per radian for each pair, (dims / 2) float32: the `freqs` of mx.fast.rope."""
    plain = theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    if yarn is None:
        return plain

    def dimension_with(rotations: float) -> float:
        """Return the dimension with this number of rotations within the original context."""
        return (
            dims * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension_with(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_with(yarn.beta_slow)), dims - 1)
    width = (high - low) or 0.001
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / width, 0, 1)
    # Fast dimensions keep their frequency, slow ones are divided by the factor; a frequency is 1 / wavelength.
    return 1.0 / ((1.0 - ramp) / plain + ramp / (plain * yarn.factor))
