"""Which attention is chosen, from dimensions, device, number of queries and context. No model is loaded."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kimi_mlx.model.attention_cost import AttentionCost, AttentionShape
from kimi_mlx.model.device_traits import CPU_TUNING, TUNINGS, DeviceKind, uses_numpy

K2 = AttentionShape(heads=64, nope_dim=128, rope_dim=64, value_dim=128, latent_dim=512)
MINI = AttentionShape(heads=4, nope_dim=32, rope_dim=32, value_dim=32, latent_dim=64)
EQUAL_SPEEDS = replace(CPU_TUNING, weight_flops=1e9, attention_flops=1e9, latent_flops=1e9)


@pytest.mark.parametrize(("shape", "break_even"), [(K2, 170), (MINI, 64), (replace(K2, heads=8), 170)])
def test_break_even_on_a_long_context_follows_from_the_dimensions(shape: AttentionShape, break_even: int) -> None:
    cost = AttentionCost(shape, EQUAL_SPEEDS)
    assert cost.is_latent(10**7, break_even - 1)
    assert not cost.is_latent(10**7, break_even + 1)
    assert cost.max_latent_queries(10**6) == break_even
    assert cost.max_latent_queries(32) == 32


def test_on_a_short_context_fewer_queries_are_latent() -> None:
    cost = AttentionCost(K2, EQUAL_SPEEDS)
    assert not cost.is_latent(0, 2)  # nothing is cached that would have to be expanded
    most = [
        max(length for length in range(1, 200) if cost.is_latent(offset, length)) for offset in (0, 50, 500, 50_000)
    ]
    assert most == sorted(most)
    assert most[0] == 1
    assert 50 < most[1] < 100 < most[2] < most[3] == 170


def test_the_faster_attention_is_chosen() -> None:
    for kind in TUNINGS:
        cost = AttentionCost(K2, TUNINGS[kind])
        for offset in (1, 100, 3_000, 100_000):
            for length in (2, 9, 64, 150, 400):
                total = offset + length
                latent_s = length * cost.expand_s + length * total * cost.latent_pair_s
                heads_s = total * cost.expand_s + length * total * cost.head_pair_s
                assert cost.is_latent(offset, length) == (latent_s <= heads_s)


@pytest.mark.parametrize(("kind", "fewest", "most"), [("metal", 100, 200), ("cuda", 60, 200)])
def test_break_even_of_k2_on_gpus(kind: DeviceKind, fewest: int, most: int) -> None:
    assert fewest <= AttentionCost(K2, TUNINGS[kind]).max_latent_queries(10**6) <= most


@pytest.mark.parametrize(
    ("kind", "platform", "value_bytes", "multiply_adds", "expected"),
    [
        ("cpu", "linux", 4, 10**9, True),
        ("cpu", "linux", 4, 1_000, False),  # evaluation takes longer than it saves
        ("cpu", "linux", 2, 10**9, False),  # NumPy has no bfloat16
        ("cpu", "darwin", 4, 10**9, False),  # MLX has Apple's BLAS there
        ("cuda", "linux", 4, 10**9, False),
        ("metal", "darwin", 4, 10**9, False),
    ],
)
def test_numpy_computes_only_where_mlx_is_slow(
    kind: DeviceKind, platform: str, value_bytes: int, multiply_adds: int, expected: bool
) -> None:
    assert uses_numpy(kind, platform, value_bytes, multiply_adds) is expected
