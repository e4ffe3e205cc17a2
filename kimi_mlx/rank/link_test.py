"""Whether what ranks send arrives as it was sent: sums, gathers and messages whose results are known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from kimi_mlx.cluster.doctor.payloads import Payload
from kimi_mlx.parallel.group import Group, MlxGroup

EXACT_LIMIT = 256
"""Whole numbers up to this are exact in bfloat16."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
BITS = {"float32": mx.uint32, "bfloat16": mx.uint16}


def check(
    group: Group, payloads: Sequence[Payload], rounds: int, tell: Callable[[str], None] = lambda name: None
) -> list[dict[str, Any]]:
    """Every payload in turns; the mismatches, at most once a payload.

    Args:
        group: the ranks.
        payloads: what they exchange, the same on all.
        rounds: how often, if a payload has as many repeats.
        tell: told the name of each before it goes out.
    """
    mismatches: dict[str, dict[str, Any]] = {}
    for turn in range(rounds):
        for payload in payloads:
            if turn >= payload.repeats:
                continue
            tell(payload.name)
            x = pattern(payload, group.rank, turn, group.size).astype(DTYPES[payload.dtype])
            mx.eval(x)
            found = compare(group, payload, turn, exchange(group, payload, x))
            if found is not None:
                mismatches.setdefault(payload.name, found)
    return list(mismatches.values())


def exchange(group: Group, payload: Payload, x: mx.array) -> mx.array:
    """As a model has it: of what was just computed, and computed with at once; evaluated."""
    if payload.kind == "message":
        assert isinstance(group, MlxGroup)
        return _to_both_sides(group, x)
    result = (group.sum(x + 0) if payload.kind == "sum" else group.gather(x + 0)) + 0
    mx.eval(result)
    return result


def _to_both_sides(group: MlxGroup, x: mx.array) -> mx.array:
    """What comes from the rank before and from the one behind, stacked, while both get x."""
    before, behind = sides(group.rank, group.size)
    came: list[mx.array] = []
    for source, target in ((before, behind), (behind, before)):
        if group.rank % 2:
            came.append(group.receive(x, source) + 0)
            mx.eval(came[-1])
        mx.eval(group.send(x + 0, target))  # waits until most of it has been received
        if not group.rank % 2:
            came.append(group.receive(x, source) + 0)
            mx.eval(came[-1])
    return mx.stack(came)


def sides(rank: int, size: int) -> tuple[int, int]:
    """The neighbours on the ring: the rank before, and the one behind."""
    return (rank - 1) % size, (rank + 1) % size


def pattern(payload: Payload, rank: int, turn: int, size: int) -> mx.array:
    """What a rank sends: whole numbers, other ones each time, whose sum over the ranks is exact in every type."""
    most = max(EXACT_LIMIT // size, 2)
    numbers = mx.arange(payload.tokens * payload.width, dtype=mx.int32)
    mixed = numbers * (2 * rank + 3) + numbers // 5 * (rank + 1) + 5 * turn
    return (mixed % most).reshape(payload.tokens, payload.width)


def expected(payload: Payload, turn: int, rank: int, size: int) -> mx.array:
    """What a rank must get, as whole numbers."""
    ranks = sides(rank, size) if payload.kind == "message" else range(size)
    stacked = mx.stack([pattern(payload, source, turn, size) for source in ranks])
    return stacked.sum(axis=0) if payload.kind == "sum" else stacked


def compare(group: Group, payload: Payload, turn: int, result: mx.array) -> dict[str, Any] | None:
    """What is wrong with a result: how many values, and whose part unless it is a sum; None if nothing is."""
    bits = BITS[payload.dtype]
    right = expected(payload, turn, group.rank, group.size).astype(DTYPES[payload.dtype])
    is_wrong = result.view(bits) != right.view(bits)
    count = int(cast(int, is_wrong.sum().item()))
    if not count:
        return None
    rows = cast("list[bool]", is_wrong.any(axis=(1, 2)).tolist()) if payload.kind != "sum" else []
    sent = sides(group.rank, group.size) if payload.kind == "message" else range(group.size)
    sources = sorted({rank for rank, row in zip(sent, rows, strict=False) if row})
    return {"payload": payload.name, "kind": payload.kind, "count": count, "of": is_wrong.size, "sources": sources}
