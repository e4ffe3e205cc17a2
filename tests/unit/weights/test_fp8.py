"""FP8 blocks: codes equal MLX's, scales equal a loop over all values, and a window equals a slice of the whole."""

from __future__ import annotations

import tracemalloc

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.weights.fp8 import E4M3FN, decode


def random_matrix(seed: int, shape: tuple[int, ...], block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return codes without NaN, and scales of very different sizes."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 256, shape, dtype=np.uint8)
    weight[weight & 127 == 127] = 0
    *leading, rows, columns = shape
    blocks = (*leading, -(-rows // block[0]), -(-columns // block[1]))
    return weight, np.exp2(rng.uniform(-20, 20, blocks)).astype(np.float32)


def test_all_codes_equal_mlx() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = np.array(mx.from_fp8(mx.array(codes), mx.float32))
    is_nan = codes & 127 == 127  # MLX decodes these as 480
    np.testing.assert_array_equal(E4M3FN[~is_nan], expected[~is_nan])
    assert np.isnan(E4M3FN[is_nan]).all()
    np.testing.assert_array_equal(np.signbit(E4M3FN[~is_nan]), codes[~is_nan] > 127)  # also of zero


@pytest.mark.parametrize(
    ("code", "value"), [(0x00, 0.0), (0x01, 2**-9), (0x07, 7 * 2**-9), (0x08, 2**-6), (0x38, 1.0), (0xFE, -448.0)]
)
def test_codes_of_the_paper(code: int, value: float) -> None:
    assert E4M3FN[code] == value


EXTENTS = st.integers(1, 40)
BLOCKS = st.tuples(st.integers(1, 16), st.integers(1, 16))


@given(st.integers(0, 2**32), EXTENTS, EXTENTS, BLOCKS)
def test_each_value_has_the_scale_of_its_block(seed: int, rows: int, columns: int, block: tuple[int, int]) -> None:
    weight, scale = random_matrix(seed, (rows, columns), block)
    decoded = decode(weight, scale, block)
    assert decoded.dtype == np.float32
    for i, j in np.ndindex(rows, columns):
        assert decoded[i, j] == E4M3FN[weight[i, j]] * scale[i // block[0], j // block[1]]


BOUND = st.none() | st.integers(-45, 45)
WINDOWS = st.builds(slice, BOUND, BOUND)


@given(st.integers(0, 2**32), st.sampled_from([(), (1,), (3,), (2, 2)]), EXTENTS, EXTENTS, BLOCKS, WINDOWS, WINDOWS)
def test_a_window_is_a_slice_of_the_whole(
    seed: int, leading: tuple[int, ...], height: int, width: int, block: tuple[int, int], rows: slice, columns: slice
) -> None:
    weight, scale = random_matrix(seed, (*leading, height, width), block)
    window = decode(weight, scale, block, rows, columns)
    np.testing.assert_array_equal(window, decode(weight, scale, block)[..., rows, columns])
    assert window.flags.c_contiguous


def test_members_of_a_stack_are_decoded_alike() -> None:
    weight, scale = random_matrix(0, (3, 20, 30), (8, 8))
    expected = [decode(*member, (8, 8)) for member in zip(weight, scale, strict=True)]
    np.testing.assert_array_equal(decode(weight, scale, (8, 8)), expected)


def test_the_blocks_of_k2() -> None:
    weight, scale = random_matrix(0, (576, 300), (128, 128))  # kv_a_proj_with_mqa has 576 rows
    assert scale.shape == (5, 3)
    expected = E4M3FN[weight] * np.kron(scale, np.ones((128, 128), np.float32))[:576, :300]
    np.testing.assert_array_equal(decode(weight, scale, (128, 128)), expected)


def test_a_wrong_number_of_scales_fails_an_assertion() -> None:
    weight, scale = random_matrix(0, (20, 30), (8, 8))
    with pytest.raises(AssertionError):
        decode(weight, scale[:2], (8, 8))


def test_memory_is_little_more_than_that_of_the_result() -> None:
    weight, scale = random_matrix(0, (2048, 512), (128, 128))
    tracemalloc.start()
    decoded = decode(weight, scale, (128, 128))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.25 * decoded.nbytes
