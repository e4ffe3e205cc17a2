"""Test that the links transfer data correctly: sums, gathers and messages whose results are known in advance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from kimi_mlx.cluster.doctor.payloads import Payload
from kimi_mlx.parallel.group import Group, MlxGroup, barrier

EXACT_LIMIT = 256
"""Integers up to this value are exact in bfloat16."""

PAYLOAD_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
BITS_DTYPES = {"float32": mx.uint32, "bfloat16": mx.uint16}


def check_links(
    group: Group, payloads: Sequence[Payload], num_rounds: int, on_payload: Callable[[str], None] = lambda name: None
) -> list[dict[str, Any]]:
    """Exchange every payload; return the mismatches, at most one per payload.

    Args:
        group: ranks that exchange the payloads.
        payloads: payloads; all ranks must pass the same ones.
        num_rounds: maximum number of rounds; a payload with fewer `repeats` is exchanged less often.
        on_payload: callback with the name of each payload, called before it is sent.
    """
    mismatches: dict[str, dict[str, Any]] = {}
    for round_index in range(num_rounds):
        for payload in payloads:
            if round_index >= payload.repeats:
                continue
            on_payload(payload.name)
            x = pattern(payload, group.rank, round_index, group.size).astype(PAYLOAD_DTYPES[payload.dtype])
            mx.eval(x)
            barrier(group)  # so that no GPU operation waits long for a late rank
            mismatch = compare(group, payload, round_index, exchange(group, payload, x))
            if mismatch is not None:
                mismatches.setdefault(payload.name, mismatch)
    return list(mismatches.values())


def exchange(group: Group, payload: Payload, x: mx.array) -> mx.array:
    """Exchange a payload as a model does: a computation produces the input, and another one uses the result."""
    if payload.kind == "message":
        assert isinstance(group, MlxGroup)
        return _exchange_with_neighbours(group, x)
    result = (group.sum(x + 0) if payload.kind == "sum" else group.gather(x + 0)) + 0
    mx.eval(result)
    return result


def _exchange_with_neighbours(group: MlxGroup, x: mx.array) -> mx.array:
    """Send x to both neighbours; return the arrays received from the previous and from the next rank, stacked."""
    previous, following = neighbours(group.rank, group.size)
    received: list[mx.array] = []
    for source, target in ((previous, following), (following, previous)):
        if group.rank % 2:  # odd ranks receive first, so that no two ranks wait for each other
            received.append(group.recv(x, source) + 0)
            mx.eval(received[-1])
        mx.eval(group.send(x + 0, target))  # waits until most of it has been received
        if not group.rank % 2:
            received.append(group.recv(x, source) + 0)
            mx.eval(received[-1])
    return mx.stack(received)


def neighbours(rank: int, size: int) -> tuple[int, int]:
    """Return the previous and the next rank on the ring."""
    return (rank - 1) % size, (rank + 1) % size


def pattern(payload: Payload, rank: int, round_index: int, size: int) -> mx.array:
    """Return the data of a rank: integers that differ by rank and round, and whose sum over all ranks is exact."""
    limit = max(EXACT_LIMIT // size, 2)
    indices = mx.arange(payload.tokens * payload.width, dtype=mx.int32)
    mixed = indices * (2 * rank + 3) + indices // 5 * (rank + 1) + 5 * round_index
    return (mixed % limit).reshape(payload.tokens, payload.width)


def expected(payload: Payload, round_index: int, rank: int, size: int) -> mx.array:
    """Return the correct result of an exchange, as integers."""
    ranks = neighbours(rank, size) if payload.kind == "message" else range(size)
    stacked = mx.stack([pattern(payload, source, round_index, size) for source in ranks])
    return stacked.sum(axis=0) if payload.kind == "sum" else stacked


def compare(group: Group, payload: Payload, round_index: int, result: mx.array) -> dict[str, Any] | None:
    """Return the number of wrong values and, except for a sum, the ranks that sent them; None if all are correct."""
    bits = BITS_DTYPES[payload.dtype]
    correct = expected(payload, round_index, group.rank, group.size).astype(PAYLOAD_DTYPES[payload.dtype])
    is_wrong = result.view(bits) != correct.view(bits)
    count = int(cast(int, is_wrong.sum().item()))
    if not count:
        return None
    has_wrong = cast("list[bool]", is_wrong.any(axis=(1, 2)).tolist()) if payload.kind != "sum" else []
    senders = neighbours(group.rank, group.size) if payload.kind == "message" else range(group.size)
    sources = sorted({rank for rank, row_has_wrong in zip(senders, has_wrong, strict=False) if row_has_wrong})
    return {
        "payload": payload.name,
        "kind": payload.kind,
        "count": count,
        "num_values": is_wrong.size,
        "sources": sources,
    }
