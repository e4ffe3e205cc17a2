"""Sizes and types of the data that ranks exchange while they serve a model, for the self-test. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from kimi_mlx.units import format_count

Kind = Literal["sum", "gather", "message"]

BATCHES = (1, 2, 4, 8)
"""Numbers of sequences decoded together."""

TYPES = {"float32": 4, "bfloat16": 2}
"""Data type -> bytes of a value."""

REPEATS = 100
"""Number of times that a small payload is timed."""

LARGE_BYTES, LARGE_REPEATS = 1 << 20, 10
"""Size from which a payload is large, and the number of times that it is timed."""

PAYLOAD_S = 1.0
"""Approximate time limit of all repeats of one payload on a slow link."""


@dataclass(frozen=True)
class Payload:
    """One exchange between ranks.

    Args:
        kind: `sum` (a layer's partial results), `gather` (shares of the vocabulary) or `message` (from a pipeline
            stage to the next; in the self-test, one to each neighbour).
        tokens: number of tokens.
        width: values per token, on each rank.
        dtype: data type of the values.
        repeats: number of times that it is timed.
    """

    kind: Kind
    tokens: int
    width: int
    dtype: str
    repeats: int = REPEATS

    @property
    def size_bytes(self) -> int:
        """Bytes on each rank."""
        return self.tokens * self.width * TYPES[self.dtype]

    @property
    def name(self) -> str:
        """Description, such as `sum of 1 token, bfloat16`."""
        return f"{self.kind} of {format_count(self.tokens, 'token')}, {self.dtype}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, for a message."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Payload:
        """Return the payload that `to_dict` wrote."""
        return cls(**value)


def all_payloads(
    hidden_size: int, vocab_size: int, world_size: int, prefill_chunk: int, bytes_per_s: float | None = None
) -> tuple[Payload, ...]:
    """Return every payload that the model causes. Large and small ones alternate, and so do types.

    Args:
        hidden_size: hidden size of the model.
        vocab_size: vocabulary size of the model.
        world_size: number of ranks.
        prefill_chunk: prompt tokens per step.
        bytes_per_s: rate of the slowest link; None if unknown.
    """
    sums = [(tokens, hidden_size) for tokens in (*BATCHES, prefill_chunk)]
    gathers = [(tokens, math.ceil(vocab_size / world_size)) for tokens in BATCHES]
    shapes: list[tuple[Kind, int, int]] = []
    for index, (tokens, width) in enumerate(reversed(sums)):
        shapes.append(("sum", tokens, width))
        if index < len(gathers):
            shapes.append(("gather", *gathers[index]))
    payloads = [Payload(*shape, dtype) for shape in shapes for dtype in TYPES]
    return tuple(replace(payload, repeats=num_repeats(payload.size_bytes, bytes_per_s)) for payload in payloads)


def quick_payloads() -> tuple[Payload, ...]:
    """Return the payloads that every ring sends once at its start: small and large ones in turn, for any model."""
    shapes = [(128, 1024), (1, 7), (16, 1024), (3, 333), (1, 7168), (64, 1025)]
    kinds: tuple[Kind, ...] = ("sum", "gather", "message")
    types = [*TYPES] * len(shapes)
    return tuple(
        Payload(kind, *shape, dtype, repeats=1) for shape, dtype in zip(shapes, types, strict=False) for kind in kinds
    )


def num_repeats(size_bytes: int, bytes_per_s: float | None) -> int:
    """Return how often to time a payload: less often if it is large or the link is slow, but at least twice."""
    limit = LARGE_REPEATS if size_bytes >= LARGE_BYTES else REPEATS
    return limit if bytes_per_s is None else max(2, min(limit, int(PAYLOAD_S * bytes_per_s / size_bytes)))


def p99(seconds: Sequence[float]) -> float:
    """Return the 99th percentile; with fewer than 100 values, the largest."""
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
