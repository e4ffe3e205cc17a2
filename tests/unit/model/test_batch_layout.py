"""The layout of a step: rotations and masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model.attention_cost import AttentionCost, AttentionShape
from kimi_mlx.model.batch_layout import MIN_PADDING, BatchLayout, LatentRun
from kimi_mlx.model.config import load_config
from kimi_mlx.model.decoder import Model, SequenceSlice
from kimi_mlx.model.device_traits import CPU_TUNING, METAL_TUNING, Tuning
from kimi_mlx.model.rope import ComplexRotation, FastRotation, Rope
from kimi_mlx.weights.assemble import load_model

STACK_MAX_KEYS = CPU_TUNING.stack_max_keys
FOLDER = Path(__file__).parents[3] / "kimi_mlx" / "models" / "kimi-mini"
K2 = AttentionShape(heads=64, nope_dim=128, rope_dim=64, value_dim=128, latent_dim=512)


EQUAL_SPEEDS = replace(CPU_TUNING, latent_flops=CPU_TUNING.attention_flops)


def layout_of(lengths: list[tuple[int, int]], tuning: Tuning = EQUAL_SPEEDS, heads: int = 64) -> BatchLayout:
    return BatchLayout(Rope(load_config(FOLDER)), lengths, AttentionCost(replace(K2, heads=heads), tuning))


def groups_of(layout: BatchLayout) -> list[list[int]]:
    return [group.indices for run in layout.runs if isinstance(run, LatentRun) for group in run.groups]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER, load_config(FOLDER), mx.float32)


@pytest.mark.parametrize("magnitude", [1.0, 1.25])
@pytest.mark.parametrize(("offset", "length"), [(0, 1), (63, 1), (1_000, 5), (65_000, 300)])
def test_a_shared_rotation_equals_mlx_fast_rope(magnitude: float, offset: int, length: int) -> None:
    rope = Rope(load_config(FOLDER))
    rope.magnitude = magnitude
    x = mx.random.normal((2, 3, length, 64))[..., 32:]
    expected, got = FastRotation(rope, [(offset, length)])(x), ComplexRotation(rope, [(offset, length)])(x)
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-6, atol=1e-6)
    assert ComplexRotation(rope, [(offset, length)])(x.astype(mx.bfloat16)).dtype == mx.bfloat16


def test_mask_is_computed_once_for_all_layers() -> None:
    step = layout_of([(2, 2), (1, 2)])
    (run,) = step.runs
    assert isinstance(run, LatentRun)
    (group,) = run.groups
    mask = group.mask(heads=3, dtype=mx.float32)
    first, second = [0, 0, 0, -np.inf], [0, 0, -np.inf, -np.inf]
    assert mask[:, 0].tolist() == [[first] * 3 + [[0, 0, 0, 0]] * 3, [second] * 3 + [first] * 3]
    assert group.mask(heads=3, dtype=mx.float32) is mask
    (query_run,) = step.query_layout([1, 0]).runs
    assert isinstance(query_run, LatentRun)
    assert query_run.groups[0].mask(heads=3, dtype=mx.float32).tolist() == [0]


@pytest.mark.parametrize(
    ("lengths", "decode_groups"),
    [
        ([(4, 1), (4, 1), (5, 1)], [[0, 1, 2]]),
        ([(4, 1), (4, 2), (4, 1)], [[0], [1], [2]]),
        ([(4, 2), (4, 2), (9, 2)], [[0, 1, 2]]),  # drafts of equal length
        ([(4, 1), (4, 0), (9, 1)], [[0, 2]]),  # a sequence without new tokens does not split a group
        ([(1, 1), (1 + MIN_PADDING, 1), (2 + MIN_PADDING, 1)], [[0, 1], [2]]),
        ([(STACK_MAX_KEYS - 1, 1), (STACK_MAX_KEYS, 1), (STACK_MAX_KEYS + 1, 1)], [[0], [1], [2]]),
        ([(4, 1), (0, 1000), (4, 1), (5, 1)], [[0], [2, 3]]),
    ],
)
def test_sequences_of_similar_length_are_stacked(
    lengths: list[tuple[int, int]], decode_groups: list[list[int]]
) -> None:
    layout = layout_of(lengths)
    assert groups_of(layout) == decode_groups
    covered = [
        token
        for run in layout.runs
        for token in (
            range(run.start, run.stop) if isinstance(run, LatentRun) else range(run.segment.start, run.segment.stop)
        )
    ]
    assert covered == list(range(layout.length))


def test_on_a_gpu_sixteen_long_sequences_are_a_few_groups() -> None:
    assert groups_of(layout_of([(4_000 + 20 * i, 1) for i in range(16)], METAL_TUNING)) == [list(range(16))]
    spread = groups_of(layout_of([(4_000 + 1_000 * i, 1) for i in range(16)], METAL_TUNING))
    assert len(spread) <= 7
    # the scores of a group are bounded
    assert len(groups_of(layout_of([(120_000, 1)] * 4, METAL_TUNING))) == 4
    assert len(groups_of(layout_of([(120_000, 1)] * 4, METAL_TUNING, heads=16))) == 1


@pytest.mark.parametrize("runs", [[(5, 1), (70, 1)], [(0, 3), (1_000, 1), (7, 4)]])
def test_concatenated_ranges_rotate_like_separate_ones(runs: list[tuple[int, int]]) -> None:
    rope = Rope(load_config(FOLDER))
    rope.magnitude = 1.25
    x = mx.random.normal((1, 3, sum(length for _, length in runs), 32))
    for kind in (FastRotation, ComplexRotation):
        alone, start = [], 0
        for run in runs:
            alone.append(kind(rope, [run])(x[:, :, start : start + run[1]]))
            start += run[1]
        expected = np.array(mx.concatenate(alone, axis=2))
        np.testing.assert_allclose(np.array(kind(rope, runs)(x)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "lengths",  # cached, new, with logits
    [
        [(3, 1, 1), (30, 4, 2), (0, 20, 0), (9, 12, 1), (300, 2, 2)],
        pytest.param(
            [(3, 1, 1), (40, 1, 1), (40, 1, 1), (254, 1, 1), (256, 1, 1), (300, 1, 1), (0, 20, 1)],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_batched_hidden_states_equal_those_of_single_sequences(
    model: Model, lengths: list[tuple[int, int, int]]
) -> None:
    mx.random.seed(6)
    new, parts, expected = [], [], []
    for offset, length, last in lengths:
        tokens = mx.random.randint(0, model.config.vocab_size, (1, offset + length))
        alone, cache = model.make_cache(), model.make_cache()
        if offset:
            model(tokens[:, :offset], alone)
            model(tokens[:, :offset], cache)
        states = model.hidden(tokens[:, offset:], [SequenceSlice(alone, length, length)])
        expected.append(states[:, length - last :])
        new.append(tokens[:, offset:])
        parts.append(SequenceSlice(cache, length, last))
    got = model.hidden(mx.concatenate(new, axis=1), parts)
    np.testing.assert_allclose(np.array(got), np.array(mx.concatenate(expected, axis=1)), rtol=1e-4, atol=1e-4)
    assert [part.cache[0].offset for part in parts] == [offset + length for offset, length, _ in lengths]


@pytest.mark.parametrize("last", [1, 8, 9, 40])
def test_last_hidden_states_alone_equal_the_last_of_all(model: Model, last: int) -> None:
    mx.random.seed(5)
    tokens = mx.random.randint(0, model.config.vocab_size, (1, 40))
    all_caches, caches = model.make_cache(), model.make_cache()
    expected, got = (
        model.hidden(tokens, [SequenceSlice(all_caches, 40, 40)]),
        model.hidden(tokens, [SequenceSlice(caches, 40, last)]),
    )
    np.testing.assert_allclose(np.array(got), np.array(expected[:, -last:]), rtol=1e-4, atol=1e-4)
    for all_cache, cache in zip(all_caches, caches, strict=True):
        assert cache.offset == 40
        np.testing.assert_allclose(np.array(cache.state[0]), np.array(all_cache.state[0]), rtol=1e-4, atol=1e-4)
