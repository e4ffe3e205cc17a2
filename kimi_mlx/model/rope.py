"""Rotary positions of the K2 family: interleaved pairs, YaRN frequencies.

Letters: B batch, H heads, L length, P qk_rope_head_dim.
"""

from __future__ import annotations

import math

import mlx.core as mx

from kimi_mlx.model.config import ModelConfig, YarnScaling, yarn_mscale


class Rope:
    """Rotates the last dimension by position; no parameters.

    Source: YaRN (https://arxiv.org/abs/2309.00071), with the correction range and mscale of DeepSeek-V3's code.
    """

    def __init__(self, config: ModelConfig):
        self.dims = config.qk_rope_head_dim
        self.periods = wavelengths(self.dims, config.rope_theta, config.yarn)
        yarn = config.yarn
        self.magnitude = (
            1.0
            if yarn is None
            else yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        )

    def at(self, offset: int, length: int) -> Rotation:
        """The rotation of `length` positions from `offset` on."""
        return FastRotation(self, offset) if is_gpu() else ComplexRotation(self, offset, length)


class FastRotation:
    """One kernel for each array that is rotated; the angles are computed in it."""

    def __init__(self, rope: Rope, offset: int):
        self._rope, self._offset = rope, offset

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x: (B, H, L, P)."""
        rope = self._rope
        if rope.magnitude != 1.0:
            x = x * rope.magnitude
        return mx.fast.rope(
            x, rope.dims, traditional=True, base=None, scale=1.0, offset=self._offset, freqs=rope.periods
        )


class ComplexRotation:
    """One complex product for each array; cosines and sines are computed once, here.

    On the CPU mx.fast.rope is some twenty kernels, cosines and sines among them, twice a layer.
    """

    def __init__(self, rope: Rope, offset: int, length: int):
        positions = mx.arange(offset, offset + length, dtype=mx.float32)
        angles = positions[:, None] * (1.0 / rope.periods)  # (L, P / 2)
        self._turns = rope.magnitude * (mx.cos(angles) + 1j * mx.sin(angles))

    def __call__(self, x: mx.array) -> mx.array:
        """Rotate x: (B, H, L, P)."""
        pairs = x.astype(mx.float32).view(mx.complex64)  # (B, H, L, P / 2)
        return (pairs * self._turns).view(mx.float32).astype(x.dtype)


Rotation = FastRotation | ComplexRotation


def is_gpu() -> bool:
    """Whether the arrays are computed on a GPU, whose `mx.fast` functions are single kernels."""
    return mx.default_device().type == mx.DeviceType.gpu


def wavelengths(dims: int, theta: float, yarn: YarnScaling | None) -> mx.array:
    """Positions a radian for each pair, (dims / 2) float32: what mx.fast.rope calls `freqs`."""
    plain = theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    if yarn is None:
        return plain

    def dimension_with(rotations: float) -> float:
        """The dimension that turns `rotations` times within the original context."""
        return (
            dims * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))
        )

    low = max(math.floor(dimension_with(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension_with(yarn.beta_slow)), dims - 1)
    width = (high - low) or 0.001
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / width, 0, 1)
    # Fast dimensions keep their frequency, slow ones are interpolated by the factor; frequencies are 1 / wavelength.
    return 1.0 / ((1.0 - ramp) / plain + ramp / (plain * yarn.factor))
