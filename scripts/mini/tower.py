"""The vision tower for training: MoonViT-3D's layers on images, as functions over a flat dict of parameters.

Parameter names are the published ones, except that `patch_embed.proj` is a matrix here.
Shape letters: N images of one grid, P patches of an image, T = P / 4 tokens, D width, H heads, d = D / H.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from scripts.mini.exponential import logsumexp, softmax, with_gradient
from scripts.mini.labels import LABELS
from scripts.mini.model import Parameters, rotate
from scripts.mini.vision_architecture import BLOCKS, EPS, PATCH_VALUES, ROPE_BASE, TABLE, TEXT_D, D, F, H

PREFIXES = ("vision_tower.", "mm_projector.", "probes.")
UNLABELLED_WEIGHT = 0.3  # weight of tokens without a label, in the loss of the probes


def init_tower(seed: int) -> Parameters:
    """Return fresh float32 parameters of tower, projector and probes."""
    mx.random.seed(seed)
    parameters: Parameters = {}

    def linear(name: str, rows: int, columns: int, scale: float = 0.7) -> None:
        parameters[f"{name}.weight"] = mx.random.normal((rows, columns), scale=scale * columns**-0.5)
        parameters[f"{name}.bias"] = mx.zeros((rows,))

    def norm(name: str, width: int) -> None:
        parameters[f"{name}.weight"], parameters[f"{name}.bias"] = mx.ones((width,)), mx.zeros((width,))

    depth_scale = 0.7 * (2 * BLOCKS) ** -0.5
    linear("vision_tower.patch_embed.proj", D, PATCH_VALUES)
    parameters["vision_tower.patch_embed.pos_emb.weight"] = mx.random.normal((TABLE, TABLE, D), scale=0.1)
    for index in range(BLOCKS):
        block = f"vision_tower.encoder.blocks.{index}"
        norm(f"{block}.norm0", D)
        norm(f"{block}.norm1", D)
        linear(f"{block}.wqkv", 3 * D, D)
        linear(f"{block}.wo", D, D, depth_scale)
        linear(f"{block}.mlp.fc0", F, D)
        linear(f"{block}.mlp.fc1", D, F, depth_scale)
    norm("vision_tower.encoder.final_layernorm", D)
    norm("mm_projector.pre_norm", D)
    linear("mm_projector.proj.0", 4 * D, 4 * D)
    linear("mm_projector.proj.2", TEXT_D, 4 * D)
    linear("probes", sum(LABELS.values()), TEXT_D)
    return parameters


def is_tower(name: str) -> bool:
    """Return whether a parameter belongs to tower, projector or probes."""
    return name.startswith(PREFIXES)


def _tanh_gelu(x: mx.array) -> mx.array:
    values = np.asarray(x)
    return mx.array(0.5 * values * (1.0 + _inner_tanh(values)))


def _inner_tanh(values: np.ndarray) -> np.ndarray:
    inner = values * values
    inner *= 0.044715
    inner += 1.0
    inner *= values
    inner *= math.sqrt(2 / math.pi)
    return np.tanh(inner, out=inner)


def _tanh_gelu_gradient(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    values = np.asarray(x)
    tanh = _inner_tanh(values)
    slope = 1.0 - tanh * tanh
    slope *= math.sqrt(2 / math.pi) * (1.0 + 3 * 0.044715 * values * values) * values
    slope += 1.0 + tanh
    slope *= 0.5
    return cotangent * mx.array(slope)


tanh_gelu = with_gradient(_tanh_gelu, _tanh_gelu_gradient)


def layer_norm(p: Parameters, name: str, x: mx.array) -> mx.array:
    """Layer norm with weight and bias."""
    return mx.fast.layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], EPS)


def linear(p: Parameters, name: str, x: mx.array) -> mx.array:
    """Matrix product with bias."""
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def interpolation(size: int) -> np.ndarray:
    """Return the bicubic interpolation (a = -0.75, half-pixel centres) of the table to a side: (size, TABLE)."""
    a, matrix = -0.75, np.zeros((size, TABLE), dtype=np.float32)
    for row in range(size):
        center = (row + 0.5) * TABLE / size - 0.5
        first = math.floor(center) - 1
        for column in range(first, first + 4):
            t = abs(center - column)
            near = (a + 2) * t**3 - (a + 3) * t**2 + 1
            far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
            matrix[row, min(max(column, 0), TABLE - 1)] += near if t <= 1 else far
    return matrix


def positions(p: Parameters, grid: tuple[int, int]) -> mx.array:
    """Return the position table at a grid: (P, D)."""
    rows, columns = (mx.array(interpolation(side)) for side in grid)
    table = p["vision_tower.patch_embed.pos_emb.weight"]
    across = columns @ table  # (TABLE, columns, D)
    return (rows @ across.reshape(TABLE, -1)).reshape(-1, D)


def rope_tables(grid: tuple[int, int]) -> tuple[mx.array, mx.array]:
    """Return cosine and sine (P, d / 2): even pairs turn by the column, odd pairs by the row."""
    width = D // H
    frequencies = ROPE_BASE ** (-4 * np.arange(width // 4) / width)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = np.stack([columns[:, None] * frequencies, rows[:, None] * frequencies], axis=-1)
    angles = angles.reshape(len(rows), -1)
    return mx.array(np.cos(angles).astype(np.float32)), mx.array(np.sin(angles).astype(np.float32))


def _attention(p: Parameters, block: str, x: mx.array, count: int, rope: tuple[mx.array, mx.array]) -> mx.array:
    qkv = linear(p, f"{block}.wqkv", x).reshape(count, -1, 3, H, D // H).transpose(2, 0, 3, 1, 4)  # (3, N, H, P, d)
    q, k = rotate(qkv[0], *rope) * (D // H) ** -0.5, rotate(qkv[1], *rope)
    logits = q @ k.swapaxes(-1, -2)  # (N, H, P, P)
    out = softmax(logits, mx.stop_gradient(logits).max(axis=-1, keepdims=True)) @ qkv[2]
    return linear(p, f"{block}.wo", out.swapaxes(1, 2).reshape(x.shape))


def features(p: Parameters, patches: mx.array, grid: tuple[int, int]) -> mx.array:
    """Return the tokens of images of one grid. patches: (N, P, 588), normalised. Returns: (N * T, text width)."""
    count = patches.shape[0]
    rope = rope_tables(grid)
    x = linear(p, "vision_tower.patch_embed.proj", patches.reshape(-1, PATCH_VALUES)).reshape(count, -1, D)
    x = (x + positions(p, grid)).reshape(-1, D)  # (N * P, D)
    for index in range(BLOCKS):
        block = f"vision_tower.encoder.blocks.{index}"
        x = x + _attention(p, block, layer_norm(p, f"{block}.norm0", x), count, rope)
        hidden = tanh_gelu(linear(p, f"{block}.mlp.fc0", layer_norm(p, f"{block}.norm1", x)))
        x = x + linear(p, f"{block}.mlp.fc1", hidden)
    x = layer_norm(p, "mm_projector.pre_norm", layer_norm(p, "vision_tower.encoder.final_layernorm", x))
    rows, columns = grid
    x = x.reshape(count, rows // 2, 2, columns // 2, 2, D).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4 * D)
    hidden = linear(p, "mm_projector.proj.0", x)
    hidden = hidden * 0.5 * (1.0 + mx.erf(hidden * 0.5**0.5))
    return linear(p, "mm_projector.proj.2", hidden)


def probe_loss(p: Parameters, tokens: mx.array, labels: mx.array) -> mx.array:
    """Return the mean cross-entropy of linear probes. tokens: (n, text width); labels: (n, labels)."""
    scores, start, losses = linear(p, "probes", tokens), 0, []
    for column, classes in enumerate(LABELS.values()):
        own, label = scores[:, start : start + classes], labels[:, column]
        start += classes
        weights = mx.where(label > 0, 1.0, UNLABELLED_WEIGHT)
        entropy = logsumexp(own) - mx.take_along_axis(own, label[:, None], axis=-1)[:, 0]
        losses.append((entropy * weights).sum() / weights.sum())
    return mx.stack(losses).mean()
