"""Quantize matrices to MLX's affine format with scales and biases that minimize the weighted squared error.

MLX's own `mx.quantize` spreads the levels of a group between its smallest and its largest value. At 2 to 4 bits a
narrower range is better: few values are far out. For each group this module tries ranges, assigns the values to
levels, computes the scale and the bias of least weighted squared error in closed form, and repeats the last two steps
from the best range. The result has MLX's format, so every program that reads that format reads it.

Letters: G group size, C columns, M members of a stack. A value w becomes scale * q + bias, q in 0 ... 2**bits - 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.model.device import compile_on_gpu, elementwise, is_gpu

BLOCK_VALUES = {True: 1 << 22, False: 1 << 18}
"""Values computed at a time, on a GPU and on a CPU: about a dozen arrays of this size are in memory."""

RANGES = {2: (0.4, 0.55, 0.7, 0.85, 1.0), 3: (0.5, 0.65, 0.8, 0.9, 1.0), 4: (0.7, 0.8, 0.9, 1.0)}
MORE_BITS_RANGES = (0.9, 1.0)
"""Bits -> parts of the distance from the mean to the smallest and to the largest value, tried in all pairs."""

NUM_REPEATS = 4
"""Number of times that levels and scales are computed again from the best range."""

MIN_EVALUATED_VALUES = 1 << 16
"""Minimum number of values for which each range is evaluated separately, to limit memory."""

NUM_TIMED_RUNS = 3
"""Number of runs of measure_speed. The first one includes the compilation of kernels."""

DAMPING = 0.01
"""Share of the mean importance of a matrix that is added to each column, so that no column has weight 0."""


@dataclass(frozen=True)
class QuantizedBlock:
    """Quantized rows.

    Args:
        arrays: weight (uint32), scales and biases; the latter in the stored type.
        squared_error: (2,), sums of the squared errors and of the squared values, both weighted by importance.
    """

    arrays: list[mx.array]
    squared_error: mx.array


def quantize(
    values: mx.array, quantization: Quantization, dtype: mx.Dtype, importance: mx.array | None, searches: bool = True
) -> QuantizedBlock:
    """Quantize the rows of a stack of matrices.

    Args:
        values: (M, rows, C) float32.
        quantization: affine quantization whose group size divides C.
        dtype: type of scales and biases.
        importance: (M, C) float32, weight of the squared errors of each column, finite and not negative; None if all
            columns are equally important.
        searches: whether to search for scales; else they are those of `mx.quantize`.
    """
    members, rows, columns = values.shape
    weights = None if importance is None else _damped(importance)
    parts: list[tuple[mx.array, ...]] = []
    error = mx.zeros((2,))
    block = max(1, BLOCK_VALUES[is_gpu()] // columns)
    flat = values.reshape(-1, columns)
    for start, stop in _blocks(members, rows, block, is_split=weights is not None):
        part = flat[start:stop]
        weight = None if weights is None else weights[start // rows]
        arrays, part_error = _quantize_rows(part, quantization, dtype, weight, searches)
        error = error + part_error
        mx.eval(*arrays, error)
        parts.append(arrays)
    arrays = [mx.concatenate(list(fields)).reshape(members, rows, -1) for fields in zip(*parts, strict=True)]
    return QuantizedBlock(arrays, error)


def measure_speed(quantization: Quantization, has_importance: bool) -> float:
    """Return the values per second that `quantize` processes on this device: the best of a few short runs."""
    columns = 2048
    rows = BLOCK_VALUES[is_gpu()] // columns
    values = mx.random.normal((1, rows, columns), key=mx.random.key(0))
    importance = mx.ones((1, columns)) if has_importance else None
    mx.eval(values)
    durations: list[float] = []
    for _ in range(NUM_TIMED_RUNS):
        start = time.perf_counter()
        quantize(values, quantization, mx.bfloat16, importance)
        durations.append(time.perf_counter() - start)
    return values.size / min(durations)


def _damped(importance: mx.array) -> mx.array:
    """Return importance normalized to mean 1 in each matrix, with DAMPING; 1 for a matrix without any importance."""
    mean = importance.mean(axis=-1, keepdims=True)
    relative = mx.where(mean > 0, importance / mx.where(mean > 0, mean, 1.0), 1.0)
    return (relative + DAMPING) / (1 + DAMPING)


def _blocks(members: int, rows: int, block: int, is_split: bool) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows of all members; if `is_split`, each is within one member."""
    for member in range(members if is_split else 1):
        end = (member + 1) * rows if is_split else members * rows
        for start in range(member * rows, end, block):
            yield start, min(start + block, end)


def _quantize_rows(
    values: mx.array, quantization: Quantization, dtype: mx.Dtype, importance: mx.array | None, searches: bool
) -> tuple[tuple[mx.array, ...], mx.array]:
    """Quantize rows (R, C) with one importance (C); return the arrays, and the sums of QuantizedBlock."""
    bits, group_size = quantization.bits, quantization.group_size
    rounded = mx.contiguous(values.astype(dtype).astype(mx.float32))  # so that a bias that equals a value is exact
    plain, scales, biases = mx.quantize(rounded, group_size, bits)
    w = values.reshape(len(values), -1, group_size)  # (R, C / G, G)
    i = None if importance is None else importance.reshape(1, -1, group_size)
    scales, biases = scales.astype(dtype), biases.astype(dtype)
    plain_values = mx.dequantize(plain, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)
    error = _error(w, plain_values.reshape(w.shape), i)
    arrays: tuple[mx.array, ...] = (plain, scales, biases)
    if searches:
        scale, bias = (array.astype(dtype) for array in _search(w, i, bits))
        stored_scale, stored_bias = scale.astype(mx.float32), bias.astype(mx.float32)
        q = _levels(w, stored_scale, stored_bias, mx.array(2.0**bits - 1))
        new_error = _error(w, q * stored_scale + stored_bias, i)
        is_better = new_error < error
        found = (pack(q.reshape(len(values), -1), bits), scale[..., 0], bias[..., 0])
        words = plain.reshape(*scales.shape, -1)  # (R, C / G, words of a group)
        arrays = (
            mx.where(is_better, found[0].reshape(words.shape), words).reshape(plain.shape),
            *(mx.where(is_better[..., 0], new, old) for new, old in zip(found[1:], (scales, biases), strict=True)),
        )
        error = mx.minimum(error, new_error)
    return arrays, mx.stack([error.sum(), _error(w, mx.array(0.0), i).sum()])


def _error(w: mx.array, values: mx.array, i: mx.array | None) -> mx.array:
    """Return the weighted squared error of each group, (R, C / G, 1)."""
    squares = mx.square(w - values)
    return (squares if i is None else squares * i).sum(axis=-1, keepdims=True)


@elementwise
def _levels(w: mx.array, scale: mx.array, bias: mx.array, top: mx.array) -> mx.array:
    """Return the nearest level of each value, as a float from 0 to `top`."""
    return mx.clip(mx.round((w - bias) / mx.where(scale == 0, 1.0, scale)), 0.0, top)


@compile_on_gpu
def _fit(
    w: mx.array, i: mx.array, sums: mx.array, scale: mx.array, bias: mx.array, top: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Assign values to the levels of a scale and bias, then fit both to that assignment.

    With S the weighted sum over a group and w centred (S w = 0), least squares gives scale = S(w q) / v and
    bias = -scale * S q / S 1, where v = S(q q) - (S q)**2 / S 1. The squared error falls by S(w q)**2 / v.

    Args:
        w: centred values, (R, C / G, G).
        i: importance, (1, C / G, G).
        sums: S 1 of each group.
        scale: scale whose levels are assigned.
        bias: its bias.
        top: highest level.

    Returns:
        decrease of the error, scale and bias, (R, C / G, 1) each.
    """
    q = _levels(w, scale, bias, top)
    weighted = q * i
    s_q = weighted.sum(axis=-1, keepdims=True)
    s_qq = (weighted * q).sum(axis=-1, keepdims=True)
    s_wq = (weighted * w).sum(axis=-1, keepdims=True)
    spread = s_qq - s_q * s_q / sums
    has_spread = spread > 1e-6 * s_qq
    new_scale = mx.where(has_spread, s_wq / mx.where(has_spread, spread, 1.0), 0.0)
    return new_scale * s_wq, new_scale, -new_scale * s_q / sums


def _search(w: mx.array, importance: mx.array | None, bits: int) -> tuple[mx.array, mx.array]:
    """Return the best scale and bias of each group of w (R, C / G, G), (R, C / G, 1) each."""
    i = mx.ones((1, 1, w.shape[-1])) if importance is None else importance
    sums = i.sum(axis=-1, keepdims=True)
    mean = (w * i).sum(axis=-1, keepdims=True) / sums
    w = w - mean
    top, low, high = mx.array(2.0**bits - 1), w.min(axis=-1, keepdims=True), w.max(axis=-1, keepdims=True)
    best = [mx.full(low.shape, -1.0), mx.zeros_like(low), mx.zeros_like(low)]
    for low_part, high_part in _range_pairs(bits):
        start = low * low_part
        best = _better(best, _fit(w, i, sums, (high * high_part - start) / top, start, top))
        if w.size >= MIN_EVALUATED_VALUES:
            mx.eval(*best)
    for _ in range(NUM_REPEATS):
        best = _better(best, _fit(w, i, sums, best[1], best[2], top))
    return best[1], best[2] + mean


def _range_pairs(bits: int) -> Iterator[tuple[float, float]]:
    ranges = RANGES.get(bits, MORE_BITS_RANGES)
    return ((low, high) for low in ranges for high in ranges)


def _better(best: Sequence[mx.array], new: Sequence[mx.array]) -> list[mx.array]:
    """Return for each group the candidate with the larger decrease of the error."""
    is_better = new[0] > best[0]
    return [mx.where(is_better, new_field, best_field) for new_field, best_field in zip(new, best, strict=True)]


def pack(levels: mx.array, bits: int) -> mx.array:
    """Pack levels as MLX does: a stream of `bits` per value, from the lowest bit of the first word on.

    Args:
        levels: (R, C) whole numbers of any type, C divisible by 32.
        bits: bits per value.

    Returns:
        (R, C * bits / 32) uint32.
    """
    groups = levels.astype(mx.uint32).reshape(len(levels), -1, 32)  # 32 values take `bits` words
    words = [mx.zeros(groups.shape[:2], mx.uint32) for _ in range(bits)]
    for position in range(32):
        word, shift = divmod(position * bits, 32)
        value = groups[..., position]
        words[word] = words[word] | (value << shift)
        if shift + bits > 32:
            words[word + 1] = words[word + 1] | (value >> (32 - shift))
    return mx.stack(words, axis=-1).reshape(len(levels), -1)
