"""Who holds what: a placement is data, made from the dimensions and the number of ranks.

The one strategy so far is `hybrid`: attention and router on every rank, the rows of every expert and of the dense
MLPs divided, the head divided over the vocabulary. It needs one collective a layer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from kimi_mlx.errors import PlacementError
from kimi_mlx.model.config import ModelConfig


@dataclass(frozen=True)
class Span:
    """Rows start (included) to stop (excluded)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Share:
    """What one rank holds; all spans count rows of the unquantized, undivided matrices.

    Args:
        expert_rows: of moe_intermediate_size, in every expert.
        shared_rows: of the shared experts, where they are not fused with the routed ones.
        dense_rows: of intermediate_size.
        vocab_rows: of vocab_size, in the head.
    """

    expert_rows: Span
    shared_rows: Span
    dense_rows: Span
    vocab_rows: Span

    def span(self, name: str) -> Span:
        """The span called `name`."""
        return getattr(self, name)


@dataclass(frozen=True)
class Placement:
    """The shares of all ranks."""

    strategy: str
    shares: tuple[Share, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.shares)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: spans become pairs."""
        shares = [{item.name: [span.start, span.stop] for item, span in _spans(share)} for share in self.shares]
        return {"strategy": self.strategy, "shares": shares}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Placement:
        """Read what to_dict has written; KeyError, TypeError or ValueError for anything else."""
        shares = (Share(**{name: Span(*map(int, span)) for name, span in share.items()}) for share in value["shares"])
        return cls(str(value["strategy"]), tuple(shares))

    @property
    def digest(self) -> str:
        """A short name that tells placements of equal strategy and size apart."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:6]


def _spans(share: Share) -> list[tuple[Field[Any], Span]]:
    return [(item, share.span(item.name)) for item in fields(share)]


@dataclass(frozen=True)
class Units:
    """The smallest piece of each axis that can be held alone: a quantization group, or one row.

    None where a checkpoint has no such matrices.

    Args:
        expert: of the columns of the experts' down projections.
        shared: of the shared experts' down projections.
        dense: of the dense layers' down projections.
    """

    expert: int | None = 1
    shared: int | None = 1
    dense: int | None = 1


def plan_hybrid(config: ModelConfig, world_size: int, units: Units) -> Placement:
    """Divide as evenly as the units allow; earlier ranks take the larger pieces.

    Raises:
        PlacementError: a rank would hold nothing of some matrix.
    """
    width = config.moe_intermediate_size
    experts = divide(width, units.expert, world_size, "expert rows")
    shared = divide(width * max(config.n_shared_experts, 1), units.shared, world_size, "shared expert rows")
    dense = divide(config.intermediate_size, units.dense, world_size, "dense rows")
    vocab = divide(config.vocab_size, 1, world_size, "rows of the vocabulary")
    shares = tuple(Share(*spans) for spans in zip(experts, shared, dense, vocab, strict=True))
    return Placement("hybrid", shares)


def divide(total: int, unit: int | None, world_size: int, what: str) -> list[Span]:
    """Cut `total` rows into consecutive spans of whole units, one a rank, their sizes at most a unit apart.

    Without a unit there is nothing to divide, and the spans are empty.
    """
    if unit is None:
        return [Span(0, 0)] * world_size
    pieces = math.ceil(total / unit)
    if pieces < world_size:
        raise PlacementError(
            f"{total} {what} in groups of {unit} make {pieces} pieces, too few for {world_size} ranks",
            hint=f"use at most {pieces} ranks for this model",
        )
    bounds = [min(-(-pieces * rank // world_size) * unit, total) for rank in range(world_size + 1)]
    return [Span(start, stop) for start, stop in itertools.pairwise(bounds)]
