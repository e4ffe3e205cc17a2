"""Which attention a device takes, as a pure function; and the tuning of each kind of device."""

from __future__ import annotations

import typing

import mlx.core as mx
import numpy as np
import pytest

from kimi_mlx.model import device
from kimi_mlx.model.device_traits import TUNINGS, DeviceKind, has_fused_attention

K2, MINI = (192, 128), (64, 32)
"""Sizes of query and value heads."""


@pytest.mark.parametrize(
    ("kind", "value_bytes", "widths", "num_queries", "expected"),
    [
        ("metal", 2, K2, 700, True),
        ("metal", 2, K2, 2, True),
        ("metal", 4, K2, 700, False),  # 40,448 bytes of threadgroup memory
        ("metal", 4, K2, 2, False),
        ("metal", 4, (128, 128), 700, True),
        ("metal", 4, (256, 256), 700, False),
        ("metal", 2, (256, 128), 9, True),
        ("metal", 4, MINI, 9, True),
        ("metal", 2, (72, 72), 9, True),
        ("metal", 2, (72, 72), 16_384, True),
        ("metal", 4, (72, 72), 16_384, True),
        ("cuda", 2, (72, 72), 16_384, True),
        ("cuda", 4, (72, 72), 16_384, False),
        ("cpu", 2, (72, 72), 16_384, False),
        ("metal", 2, (72, 72), 8, False),
        ("metal", 2, (80, 64), 9, True),
        ("metal", 2, (80, 64), 1, False),
        ("metal", 2, (160, 128), 9, False),
        ("metal", 2, (64, 128), 9, False),  # values cannot be padded to the width of the queries
        ("cuda", 2, K2, 700, False),
        ("cuda", 2, (128, 128), 700, True),
        ("cuda", 2, (128, 64), 1, False),
        ("cuda", 4, (128, 128), 700, False),
        ("cuda", 2, (100, 100), 700, False),
        ("cpu", 4, MINI, 700, False),
        ("cpu", 2, K2, 700, False),
    ],
)
def test_fused_attention_is_used_only_where_its_kernel_exists(
    kind: DeviceKind, value_bytes: int, widths: tuple[int, int], num_queries: int, expected: bool
) -> None:
    assert has_fused_attention(kind, value_bytes, *widths, num_queries) is expected


def test_every_kind_of_device_has_a_tuning() -> None:
    assert set(TUNINGS) == set(typing.get_args(DeviceKind))


def test_nothing_is_compiled_on_a_cpu_even_where_mlx_has_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Mac, mx.compile would call clang for a computation on the CPU."""
    traces: list[str] = []

    @device.elementwise
    def double(x: mx.array) -> mx.array:
        traces.append("CPU" if isinstance(x.tolist(), list) else "")  # tolist() is an error while compiling
        return 2 * x

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert double(mx.array([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert double(mx.array([3.0])).tolist() == [6.0]
    assert traces == ["CPU", "CPU"]
    assert device.device_kind() == "cpu"


def test_a_compiled_function_is_used_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    num_calls = 0

    @device.elementwise
    def double(x: mx.array) -> mx.array:
        nonlocal num_calls
        num_calls += 1
        return mx.stop_gradient(x)  # nothing to fuse, so no compiler is called

    monkeypatch.setattr(device, "is_gpu", lambda: True)
    for size in (1, 2, 3):
        np.testing.assert_array_equal(np.array(double(mx.ones(size))), np.ones(size))
    assert num_calls == 1
