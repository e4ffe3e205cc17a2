"""Division of the memory for experts: slots of each layer, and a staging area that the layers share.

Does not import MLX.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_STAGING = 64
"""Maximum number of slots in the staging area: experts that are read ahead of a chunk of a prompt."""

STAGING_SHARE = 8
"""The staging area takes at most 1 / STAGING_SHARE of the memory for experts, or its minimum if that is more."""


@dataclass(frozen=True)
class StreamedLayer:
    """The routed experts of one layer on a rank.

    Args:
        num_experts: number of experts.
        expert_bytes: bytes of one expert in memory.
        format: key of the format of the experts; layers with equal formats share a staging area.
    """

    num_experts: int
    expert_bytes: int
    format: Hashable = None


@dataclass(frozen=True)
class SlotPlan:
    """Numbers of slots for experts.

    Args:
        kept: number of slots of each layer.
        staging: number of slots in the staging area of each format.
        num_bytes: bytes of all slots.
    """

    kept: tuple[int, ...]
    staging: int
    num_bytes: int


def min_staging(layers: Sequence[StreamedLayer], experts_per_token: int) -> int:
    """Return the minimum number of slots in the staging area: the experts of a token in two layers."""
    return min(2 * experts_per_token, max((layer.num_experts for layer in layers), default=0))


def min_expert_bytes(layers: Sequence[StreamedLayer], experts_per_token: int) -> int:
    """Return the minimum memory for experts: the smallest staging area, without slots of the layers."""
    return min_staging(layers, experts_per_token) * _staged_bytes(layers)


def divide_slots(
    num_bytes: int,
    layers: Sequence[StreamedLayer],
    experts_per_token: int,
    rates: Sequence[np.ndarray] | None = None,
) -> SlotPlan:
    """Divide the memory for experts of a rank.

    The memory beyond the staging area goes to the experts with the highest rates per byte, so that layers whose choices
    concentrate on few experts get fewer slots. With equal rates all layers get the same share.

    Args:
        num_bytes: memory for experts; the minimum staging area is allocated even if it is larger.
        layers: layers of the rank with routed experts.
        experts_per_token: number of routed experts that a token chooses.
        rates: uses of each expert per token, (num_experts,) for each layer, in any unit; None if unknown.
    """
    staged_bytes, all_bytes = _staged_bytes(layers), sum(layer.num_experts * layer.expert_bytes for layer in layers)
    staging = min_staging(layers, experts_per_token)
    if staging and num_bytes - staging * staged_bytes < all_bytes:
        limit = min(MAX_STAGING, max(layer.num_experts for layer in layers))
        staging = max(staging, min(num_bytes // (STAGING_SHARE * staged_bytes), limit))
    kept = _choose_kept(num_bytes - staging * staged_bytes, layers, rates)
    used = sum(count * layer.expert_bytes for count, layer in zip(kept, layers, strict=True))
    return SlotPlan(tuple(kept), staging, staging * staged_bytes + used)


def _staged_bytes(layers: Sequence[StreamedLayer]) -> int:
    """Return the bytes of one slot in the staging area of every format."""
    sizes = {(layer.format, layer.expert_bytes) for layer in layers}
    return sum(size for _, size in sizes)


def _choose_kept(num_bytes: int, layers: Sequence[StreamedLayer], rates: Sequence[np.ndarray] | None) -> list[int]:
    """Return the number of slots of each layer: its experts among those with the highest rates per byte."""
    sorted_rates = [
        np.zeros(layer.num_experts) if rates is None else np.sort(rates[index])[::-1] / layer.expert_bytes
        for index, layer in enumerate(layers)
    ]
    kept = [0] * len(layers)
    queue = [(-values[0], 0, index) for index, values in enumerate(sorted_rates) if len(values)]
    heapq.heapify(queue)
    while queue:
        _, count, index = heapq.heappop(queue)
        num_bytes -= layers[index].expert_bytes
        if num_bytes < 0:
            break
        kept[index] = count + 1
        if count + 1 < layers[index].num_experts:
            heapq.heappush(queue, (-sorted_rates[index][count + 1], count + 1, index))
    return kept
