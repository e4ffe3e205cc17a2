"""Payloads of the self-test: every size that occurs, with exact results."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimi_mlx.cluster.doctor.payloads import BATCHES, TYPES, Payload, all_payloads, num_repeats, p99, quick_payloads
from kimi_mlx.parallel.group import SingleGroup
from kimi_mlx.rank.link_test import EXACT_LIMIT, compare, expected, pattern


def test_payloads_cover_every_size_and_alternate() -> None:
    payloads = all_payloads(7168, 163840, 2, 512)
    assert {(each.kind, each.tokens, each.width, each.dtype) for each in payloads} == {
        *(("sum", tokens, 7168, dtype) for tokens in (*BATCHES, 512) for dtype in TYPES),
        *(("gather", tokens, 81920, dtype) for tokens in BATCHES for dtype in TYPES),
    }
    sizes = [each.size_bytes for each in payloads]
    assert all(a != b for a, b in pairwise(sizes))
    assert max(sizes) == 512 * 7168 * 4
    assert Payload.from_dict(payloads[0].to_dict()) == payloads[0]
    assert payloads[0].name == "sum of 512 tokens, float32"


def test_quick_payloads_cover_every_kind_and_type_in_few_bytes() -> None:
    payloads = quick_payloads()
    assert {(each.kind, each.dtype) for each in payloads} == {
        (kind, dtype) for kind in ("sum", "gather", "message") for dtype in TYPES
    }
    assert sum(each.size_bytes for each in payloads) < 3e6
    assert all(each.repeats == 1 for each in payloads)


@given(st.integers(1, 1 << 30), st.one_of(st.none(), st.floats(1e3, 1e11)))
def test_slow_links_get_fewer_repeats(size: int, rate: float | None) -> None:
    count = num_repeats(size, rate)
    assert 2 <= count <= 100
    assert rate is None or count == 2 or count * size / rate <= 1.001


def test_99th_percentile() -> None:
    assert p99([float(each) for each in range(1, 101)]) == 99
    assert p99([3.0, 1.0]) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sums_are_exact_in_every_type_and_differ_between_repeats(size: int, dtype: mx.Dtype) -> None:
    payload = Payload("sum", 2, 300, "bfloat16")
    parts = [pattern(payload, rank, 1, size).astype(dtype) for rank in range(size)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    correct = expected(payload, 1, 0, size)
    assert int(correct.max().item()) <= EXACT_LIMIT  # pyright: ignore[reportArgumentType]
    assert mx.array_equal(total.astype(mx.int32), correct)
    assert not mx.array_equal(correct, expected(payload, 2, 0, size))


class Faulty(SingleGroup):
    """A group of three ranks, one of which delivers wrong values."""

    size = 3


def test_wrong_value_is_traced_to_its_rank() -> None:
    group = Faulty()
    gather = Payload("gather", 1, 5, "float32")
    result = expected(gather, 0, 0, 3).astype(mx.float32)
    assert compare(group, gather, 0, result) is None
    result[2, 0, 4] += 1
    mismatch = {"payload": "gather of 1 token, float32", "kind": "gather", "count": 1, "num_values": 15, "sources": [2]}
    assert compare(group, gather, 0, result) == mismatch
    message = Payload("message", 1, 5, "float32")
    result = expected(message, 0, 0, 3).astype(mx.float32)
    assert compare(group, message, 0, result) is None
    result[0, 0, 0] = -result[0, 0, 0]  # one bit of rank 2
    found = compare(group, message, 0, result)
    assert found is not None
    assert (found["count"], found["num_values"], found["sources"]) == (1, 10, [2])
    total = Payload("sum", 1, 5, "bfloat16")
    values = expected(total, 0, 0, 3).astype(mx.bfloat16)
    values[0, 0] = mx.nan
    found = compare(group, total, 0, values)
    assert found is not None
    assert (found["count"], found["sources"]) == (1, [])
