"""Scales of least error: MLX's format, the error that is reported, importance, and never worse than min-max."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.weights import scale_search
from kimi_mlx.weights.scale_search import QuantizedBlock, pack, quantize

FORMATS = [Quantization(bits, group_size) for bits in (2, 3, 4, 5, 6, 8) for group_size in (32, 64, 128)]


def stack(members: int = 2, rows: int = 6, columns: int = 256, seed: int = 0) -> mx.array:
    """Return random matrices with a few large values, as trained ones have."""
    rng = np.random.default_rng(seed)
    return mx.array(rng.standard_t(5, (members, rows, columns)).astype(np.float32) * 0.02 + 0.003)


def dequantized(block: QuantizedBlock, quantization: Quantization) -> np.ndarray:
    weight, scales, biases = (array.reshape(-1, array.shape[-1]) for array in block.arrays)
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    values = mx.dequantize(weight, scales, biases, quantization.group_size, quantization.bits)
    return np.array(values).reshape(*block.arrays[0].shape[:2], -1)


def squared_errors(
    values: mx.array, block: QuantizedBlock, quantization: Quantization, weights: np.ndarray | float = 1.0
) -> np.ndarray:
    """Return the squared error of each group."""
    squares = (np.array(values) - dequantized(block, quantization)) ** 2 * weights
    return squares.reshape(-1, quantization.group_size).sum(axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_levels_are_packed_as_mlx_packs_them(bits: int) -> None:
    levels = mx.random.randint(0, 2**bits, (7, 256), key=mx.random.key(bits))
    ones = mx.ones((7, 4))
    assert mx.array_equal(mx.dequantize(pack(levels, bits), ones, ones * 0, 64, bits), levels.astype(mx.float32))


@pytest.mark.parametrize("quantization", FORMATS, ids=lambda q: f"{q.bits}-{q.group_size}")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=["bf16", "f32"])
def test_no_group_is_worse_than_with_min_max(quantization: Quantization, dtype: mx.Dtype) -> None:
    values = stack()
    plain, found = (quantize(values, quantization, dtype, None, searches) for searches in (False, True))
    assert [array.dtype for array in found.arrays] == [mx.uint32, dtype, dtype]
    assert [array.shape for array in found.arrays] == [array.shape for array in plain.arrays]
    before, after = (squared_errors(values, block, quantization) for block in (plain, found))
    assert (after <= before * (1 + 1e-4) + 1e-12).all()
    error, total = np.array(found.squared_error)
    assert error == pytest.approx(after.sum(), rel=1e-3)
    assert total == pytest.approx((np.array(values) ** 2).sum(), rel=1e-4)


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.70), (3, 0.80), (4, 0.90)])
def test_the_error_at_few_bits_falls_well_below_min_max(bits: int, gain: float) -> None:
    values, quantization = stack(rows=64), Quantization(bits, 128)
    plain, found = (quantize(values, quantization, mx.bfloat16, None, searches) for searches in (False, True))
    assert np.array(found.squared_error)[0] < gain * np.array(plain.squared_error)[0]


def test_important_columns_get_a_smaller_error() -> None:
    values, quantization = stack(rows=32), Quantization(2, 64)
    importance = np.exp(np.random.default_rng(1).normal(size=(2, 256)) * 2).astype(np.float32)
    weights = importance[:, None] / importance.mean(axis=1)[:, None, None]
    even, weighted = (quantize(values, quantization, mx.bfloat16, i) for i in (None, mx.array(importance)))
    errors = [squared_errors(values, block, quantization, weights).sum() for block in (even, weighted)]
    assert errors[1] < 0.75 * errors[0]


def test_each_member_has_its_own_importance() -> None:
    values, quantization = stack(), Quantization(2, 64)
    importance = mx.array(np.random.default_rng(2).random((2, 256), np.float32))
    both = quantize(values, quantization, mx.bfloat16, importance)
    for member in range(2):
        part = slice(member, member + 1)
        alone = quantize(values[part], quantization, mx.bfloat16, importance[part])
        assert all(mx.array_equal(whole[part], one) for whole, one in zip(both.arrays, alone.arrays, strict=True))


def test_unused_columns_keep_a_small_weight_and_unused_matrices_count_evenly() -> None:
    values, quantization = stack(members=1), Quantization(2, 32)
    importance = np.ones((1, 256), np.float32)
    importance[:, :64] = 0
    block = quantize(values, quantization, mx.bfloat16, mx.array(importance))
    plain = quantize(values, quantization, mx.bfloat16, None, searches=False)
    errors = [squared_errors(values, each, quantization).reshape(6, -1)[:, :2].sum() for each in (block, plain)]
    assert errors[0] < errors[1]
    zero, even = (quantize(values, quantization, mx.bfloat16, i) for i in (mx.zeros((1, 256)), None))
    assert all(mx.array_equal(a, b) for a, b in zip(zero.arrays, even.arrays, strict=True))


def test_constant_groups_and_zeros_are_exact() -> None:
    values = mx.concatenate([mx.zeros((1, 2, 64)), mx.full((1, 2, 64), 0.5)], axis=-1)
    for bits in (2, 8):
        quantization = Quantization(bits, 64)
        assert np.array_equal(dequantized(quantize(values, quantization, mx.bfloat16, None), quantization), values)


def test_the_block_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    values, quantization = stack(), Quantization(3, 64)
    importance = mx.array(np.random.default_rng(2).random((2, 256), np.float32))
    for weights in (None, importance):
        whole = quantize(values, quantization, mx.bfloat16, weights)
        with monkeypatch.context() as patch:
            patch.setattr(scale_search, "BLOCK_VALUES", dict.fromkeys((True, False), 1000))
            blocks = quantize(values, quantization, mx.bfloat16, weights)
        assert all(mx.array_equal(a, b) for a, b in zip(whole.arrays, blocks.arrays, strict=True))
