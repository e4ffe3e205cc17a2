"""MoonViT-3D, the vision tower of K2.5 and later, and the projector to the hidden size of the text model.

Letters: P patches of all images, T features of all images, D vt_hidden_size, M merged patches per feature, H heads,
Q size of a head.
Source: Kimi-VL report (https://arxiv.org/abs/2504.07491) for MoonViT; K2.5's published configuration and tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from kimi_mlx.errors import VisionError
from kimi_mlx.model.device import device_kind, elementwise
from kimi_mlx.model.device_traits import TUNINGS
from kimi_mlx.model.tree import LayerWeights
from kimi_mlx.model.vision_attention import attend_image, attend_images
from kimi_mlx.model.vision_config import CHANNELS, Grid, VisionConfig
from kimi_mlx.model.vision_names import PROJECTOR_PATH, VISION_PATH
from kimi_mlx.model.vision_positions import add_positions, patch_rotations, rotate
from kimi_mlx.model.weight import Matrix

NORM_EPS = 1e-5
"""Epsilon of the tower's norms (Moonshot's published code)."""


class BiasedLinear(Matrix):
    """y = x @ weight.T + bias."""

    def __init__(self, weights: LayerWeights, name: str):
        super().__init__(weights.matrix(name))
        self.bias = weights.array(name + ".bias")

    def __call__(self, x: mx.array) -> mx.array:
        """(..., columns) -> (..., rows)."""
        if self.quantization is None:
            return mx.addmm(self["bias"], x, self["weight"].T)
        return self.matmul(x) + self["bias"]


class LayerNorm(nn.Module):
    """Layer norm with weight and bias."""

    def __init__(self, weights: LayerWeights, name: str, eps: float):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = weights.array(name), weights.array(name + ".bias")

    def __call__(self, x: mx.array) -> mx.array:
        """Normalize the last dimension."""
        return mx.fast.layer_norm(x, self["weight"], self["bias"], self.eps)


TANH_GELU = 2 * math.sqrt(2 / math.pi), 2 * math.sqrt(2 / math.pi) * 0.044715
"""Coefficients of x and of x ** 3 in 2 * u, where the tanh form of GELU is x * 0.5 * (1 + tanh(u))."""


@elementwise
def gelu_tanh(x: mx.array) -> mx.array:
    """Return the tanh form of GELU, computed in float32: 0.5 * (1 + tanh(u)) is sigmoid(2 * u)."""
    y, (linear, cubic) = x.astype(mx.float32), TANH_GELU
    return (y * mx.sigmoid(y * (linear + cubic * y * y))).astype(x.dtype)


@elementwise
def gelu_exact(x: mx.array) -> mx.array:
    """Return GELU with the error function, computed in float32."""
    y = x.astype(mx.float32)
    return (0.5 * y * (1 + mx.erf(y * math.sqrt(0.5)))).astype(x.dtype)


class VisionBlock(nn.Module):
    """Attention and MLP, each after a norm and with a residual."""

    def __init__(self, config: VisionConfig, weights: LayerWeights, path: str):
        super().__init__()
        self.num_heads = config.vt_num_attention_heads
        self.norm0 = LayerNorm(weights, path + "norm0", NORM_EPS)
        self.wqkv = BiasedLinear(weights, path + "wqkv")
        self.wo = BiasedLinear(weights, path + "wo")
        self.norm1 = LayerNorm(weights, path + "norm1", NORM_EPS)
        self.fc0 = BiasedLinear(weights, path + "mlp.fc0")
        self.fc1 = BiasedLinear(weights, path + "mlp.fc1")

    def __call__(self, x: mx.array, rotations: mx.array, lengths: Sequence[int]) -> mx.array:
        """(P, D) -> (P, D).

        Args:
            x: hidden states of all images.
            rotations: (P, Q / 2) complex64.
            lengths: number of patches of each image.
        """
        return self.finish(x, attend_images(*self.qkv(x, rotations), lengths))

    def qkv(self, x: mx.array, rotations: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries, keys and values of hidden states (P, D), each (1, H, P, Q)."""
        qkv = self.wqkv(self.norm0(x)).reshape(x.shape[0], 3, self.num_heads, -1)
        q, k = (rotate(qkv[:, index], rotations) for index in (0, 1))  # (P, H, Q)
        q, k, v = (part.swapaxes(0, 1)[None] for part in (q, k, qkv[:, 2]))  # (1, H, P, Q)
        return q, k, v

    def finish(self, x: mx.array, attended: mx.array) -> mx.array:
        """Return the output for some hidden states (L, D) and their attention (1, H, L, Q)."""
        x = x + self.wo(attended[0].swapaxes(0, 1).reshape(x.shape[0], -1))
        return x + self.fc1(gelu_tanh(self.fc0(self.norm1(x))))


class Projector(nn.Module):
    """Two layers from merged patches to features."""

    def __init__(self, config: VisionConfig, weights: LayerWeights):
        super().__init__()
        self.pre_norm = LayerNorm(weights, PROJECTOR_PATH + "pre_norm", config.projector_ln_eps)
        self.fc0 = BiasedLinear(weights, PROJECTOR_PATH + "proj.0")
        self.fc1 = BiasedLinear(weights, PROJECTOR_PATH + "proj.2")

    def __call__(self, x: mx.array) -> mx.array:
        """(T, M, D) -> (T, text_hidden_size)."""
        return self.fc1(gelu_exact(self.fc0(self.pre_norm(x).reshape(x.shape[0], -1))))


class VisionTower(nn.Module):
    """The tower and the projector: patches of images to features, which replace embeddings of the text model.

    Args:
        config: dimensions.
        weights: entries of kimi_mlx.model.vision_names.vision_entries.
    """

    def __init__(self, config: VisionConfig, weights: LayerWeights):
        super().__init__()
        self.config = config
        self.patch_embed = BiasedLinear(weights, VISION_PATH + "patch_embed.proj")
        self.position_table = weights.array(VISION_PATH + "patch_embed.pos_emb")
        self.blocks = [
            VisionBlock(config, weights, f"{VISION_PATH}encoder.blocks.{index}.")
            for index in range(config.vt_num_hidden_layers)
        ]
        self.final_layernorm = LayerNorm(weights, VISION_PATH + "encoder.final_layernorm", NORM_EPS)
        self.projector = Projector(config, weights)
        # An array that is still lazy belongs to this thread's stream, and could not be evaluated in another thread.
        mx.eval(self.parameters())

    def __call__(self, pixels: mx.array, grid_thw: mx.array | Iterable[Sequence[int]]) -> mx.array:
        """Return the features of images, evaluated; arguments and errors as of Encoding."""
        encoding = Encoding(self, pixels, grid_thw)
        while not encoding.step():
            pass
        return encoding.features

    def embed(self, pixels: mx.array, grids: Sequence[Grid]) -> mx.array:
        """(P, 3, patch_size, patch_size) -> (P, D): the input of the first block."""
        dtype = self["position_table"].dtype
        if pixels.dtype == mx.uint8:
            pixels = (pixels.astype(mx.float32) / 255 - 0.5) / 0.5
        x = self.patch_embed(pixels.reshape(pixels.shape[0], -1).astype(dtype))
        images = split(x, [math.prod(grid) for grid in grids])
        table = self["position_table"]
        return mx.concatenate([add_positions(image, table, grid) for image, grid in zip(images, grids, strict=True)])

    def project(self, x: mx.array, grids: Sequence[Grid]) -> mx.array:
        """(P, D) -> (T, text_hidden_size): the features for the output of the last block."""
        images = split(self.final_layernorm(x), [math.prod(grid) for grid in grids])
        size = self.config.merge_kernel_size
        return self.projector(
            mx.concatenate([merge(image, grid, size) for image, grid in zip(images, grids, strict=True)])
        )


class Encoding:
    """Encoding of images in parts, so that steps of the text model can run in between.

    A part is some blocks; if one block of one image exceeds the budget, it is a slice of the patches in one block.

    Args:
        tower: the vision tower.
        pixels: (P, 3, patch_size, patch_size), patches of all images, each image in row-major order, frame after frame;
            uint8, or floats that are already normalized from 0..255 to -1..1.
        grid_thw: (images, 3) integers: frames, rows and columns of patches.
        part_multiply_adds: largest number of multiply-adds of a part, unless the smallest possible part has more;
            None for the device's.

    Attributes:
        num_parts: number of parts; the same as VisionConfig.num_parts for these arguments.
        features: (T, text_hidden_size) in the compute dtype, evaluated; exists after the last part.

    Raises:
        VisionError: the grids do not fit the patches, or the tower does not take them.
    """

    def __init__(
        self,
        tower: VisionTower,
        pixels: mx.array,
        grid_thw: mx.array | Iterable[Sequence[int]],
        part_multiply_adds: int | None = None,
    ):
        budget = TUNINGS[device_kind()].encode_multiply_adds if part_multiply_adds is None else part_multiply_adds
        config = tower.config
        self._tower, self._grids = tower, check_images(config, pixels, grid_thw)
        self._lengths = [math.prod(grid) for grid in self._grids]
        self._layers_per_part = config.layers_per_part(self._grids, budget)
        self._slices_per_layer = config.slices_per_layer(self._grids, budget)
        self.num_parts = config.num_parts(self._grids, budget)
        self._num_layers_done = 0
        self.features: mx.array
        rotations = [patch_rotations(grid, config.head_dim) for grid in self._grids]
        self._rotations = mx.array(np.concatenate(rotations))
        self._states = pixels  # hidden states after the first step
        self._qkv: tuple[mx.array, ...] = ()
        self._slices: list[mx.array] = []

    def step(self) -> bool:
        """Compute and evaluate the next part; return whether it was the last one."""
        tower = self._tower
        if self._num_layers_done == 0 and not self._slices:
            self._states = tower.embed(self._states, self._grids)
        if self._slices_per_layer == 1:
            self._compute_layers()
        else:
            self._compute_slice()
        is_last = self._num_layers_done == len(tower.blocks)
        if is_last:
            self._states = self.features = tower.project(self._states, self._grids)
        mx.eval(self._states, self._qkv, self._slices)
        return is_last

    def _compute_layers(self) -> None:
        first, blocks = self._num_layers_done, self._tower.blocks
        self._num_layers_done = min(first + self._layers_per_part, len(blocks))
        for block in blocks[first : self._num_layers_done]:
            self._states = block(self._states, self._rotations, self._lengths)

    def _compute_slice(self) -> None:
        """Compute the next slice of the patches of the only image; the first one also computes all keys and values."""
        block, x = self._tower.blocks[self._num_layers_done], self._states
        if not self._slices:
            self._qkv = block.qkv(x, self._rotations)
        q, k, v = self._qkv
        index, count = len(self._slices), self._slices_per_layer
        start, stop = x.shape[0] * index // count, x.shape[0] * (index + 1) // count
        self._slices.append(block.finish(x[start:stop], attend_image(q[:, :, start:stop], k, v)))
        if len(self._slices) == count:
            self._states = mx.concatenate(self._slices)
            self._num_layers_done, self._qkv, self._slices = self._num_layers_done + 1, (), []


def check_images(config: VisionConfig, pixels: mx.array, grid_thw: mx.array | Iterable[Sequence[int]]) -> list[Grid]:
    """Check that patches fit their grids; return the grids as tuples.

    Raises:
        VisionError: see Encoding.
    """
    rows = grid_thw.tolist() if isinstance(grid_thw, mx.array) else grid_thw
    grids: list[Grid] = []
    for frames, height, width in rows:  # pyright: ignore[reportGeneralTypeIssues]
        grids.append((int(frames), int(height), int(width)))
        config.check_grid(grids[-1])
    patches = sum(map(math.prod, grids))
    expected = (patches, CHANNELS, config.patch_size, config.patch_size)
    if not patches or tuple(pixels.shape) != expected:
        raise VisionError(f"patches have the shape {tuple(pixels.shape)}, but grids {grids} need {expected}")
    return grids


def split(x: mx.array, lengths: Sequence[int]) -> list[mx.array]:
    """Split the first axis into parts of these lengths."""
    ends = accumulate(lengths)
    return [x[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def merge(x: mx.array, grid: Grid, size: tuple[int, int]) -> mx.array:
    """Average over the frames of an image, and put neighbouring patches side by side: (P, D) -> (T, M, D).

    Args:
        x: hidden states of the image.
        grid: its grid.
        size: rows and columns of patches that become one feature; they are in row-major order.
    """
    frames, rows, columns = grid
    height, width = size
    x = x.reshape(frames, -1, x.shape[-1])
    mean = x[0] if frames == 1 else x.astype(mx.float32).mean(axis=0).astype(x.dtype)
    blocks = mean.reshape(rows // height, height, columns // width, width, -1)
    return blocks.swapaxes(1, 2).reshape(-1, height * width, x.shape[-1])
