"""What the ranks will send each other while they serve a model: sizes and types, for the self-test. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Kind = Literal["sum", "gather", "message"]

BATCHES = (1, 2, 4, 8)
"""Sequences that are decoded together."""

TYPES = {"float32": 4, "bfloat16": 2}
"""What ranks compute in -> bytes of a value."""

REPEATS = 100
"""How often a payload is timed, if it is small."""

LARGE_BYTES, LARGE_REPEATS = 1 << 20, 10
"""How often, if it is large."""

PAYLOAD_S = 1.0
"""On a slow link the repeats of one payload take about so long at most."""


@dataclass(frozen=True)
class Payload:
    """One exchange.

    Args:
        kind: of partial results of a layer the sum; of the parts of the vocabulary a gather; from a stage to the
            next a message, here one to each neighbour.
        tokens: at once.
        width: values a token, on each rank.
        dtype: of the values.
        repeats: how often it is timed.
    """

    kind: Kind
    tokens: int
    width: int
    dtype: str
    repeats: int = REPEATS

    @property
    def size_bytes(self) -> int:
        """On each rank."""
        return self.tokens * self.width * TYPES[self.dtype]

    @property
    def name(self) -> str:
        """Such as `sum of 1 token, bfloat16`."""
        return f"{self.kind} of {self.tokens} token{'s' * (self.tokens > 1)}, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """For a message."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Payload:
        """Read what to_dict has written."""
        return cls(**value)


def all_payloads(
    hidden_size: int, vocab_size: int, world_size: int, prefill_chunk: int, bytes_per_s: float | None = None
) -> tuple[Payload, ...]:
    """Every payload that will occur, large ones between small ones and types in turn: shapes alternate.

    Args:
        hidden_size: of the model.
        vocab_size: of the model.
        world_size: how many ranks share it.
        prefill_chunk: tokens of a prompt at once.
        bytes_per_s: of the slowest link, if it is known.
    """
    sums = [(tokens, hidden_size) for tokens in (*BATCHES, prefill_chunk)]
    gathers = [(tokens, math.ceil(vocab_size / world_size)) for tokens in BATCHES]
    shapes: list[tuple[Kind, int, int]] = []
    for index, (tokens, width) in enumerate(reversed(sums)):
        shapes.append(("sum", tokens, width))
        if index < len(gathers):
            shapes.append(("gather", *gathers[index]))
    payloads = [Payload(*shape, dtype) for shape in shapes for dtype in TYPES]
    return tuple(replace(each, repeats=repeats(each.size_bytes, bytes_per_s)) for each in payloads)


def quick_payloads() -> tuple[Payload, ...]:
    """What every start of a ring sends once: small and large in turn, whatever the model."""
    shapes = [(128, 1024), (1, 7), (16, 1024), (3, 333), (1, 7168), (64, 1025)]
    kinds: tuple[Kind, ...] = ("sum", "gather", "message")
    types = [*TYPES] * len(shapes)
    return tuple(
        Payload(kind, *shape, dtype, repeats=1) for shape, dtype in zip(shapes, types, strict=False) for kind in kinds
    )


def repeats(size_bytes: int, bytes_per_s: float | None) -> int:
    """How often to time a payload: fewer times if it is large or the link slow, twice at least."""
    most = LARGE_REPEATS if size_bytes >= LARGE_BYTES else REPEATS
    return most if bytes_per_s is None else max(2, min(most, int(PAYLOAD_S * bytes_per_s / size_bytes)))


def p99(seconds: Sequence[float]) -> float:
    """The time that 99 of 100 stay below, or the longest of fewer."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
