"""Division of the memory for experts: places that each layer keeps, and a staging area for all layers.

Does not import MLX.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

MAX_STAGING = 64
"""Largest number of experts in the staging area: what is read ahead of a chunk of a prompt."""

STAGING_SHARE = 8
"""The staging area takes at most one of this many bytes of the memory for experts, if that is more than its minimum."""


@dataclass(frozen=True)
class StreamedLayer:
    """The routed experts of one layer on a rank.

    Args:
        num_experts: their number.
        expert_bytes: bytes of one in memory.
        format: equal for layers whose experts have the same arrays; they share a staging area.
    """

    num_experts: int
    expert_bytes: int
    format: Hashable = None


@dataclass(frozen=True)
class SlotPlan:
    """Numbers of places for experts.

    Args:
        kept: places of each layer.
        staging: places in the staging area of each format.
        num_bytes: bytes of all of them.
    """

    kept: tuple[int, ...]
    staging: int
    num_bytes: int


def min_staging(layers: Sequence[StreamedLayer], experts_per_token: int) -> int:
    """Return the smallest number of places in the staging area: experts of a token, and as many of the next layer."""
    return min(2 * experts_per_token, max((layer.num_experts for layer in layers), default=0))


def min_expert_bytes(layers: Sequence[StreamedLayer], experts_per_token: int) -> int:
    """Return the smallest memory for experts that runs: the staging area alone."""
    return min_staging(layers, experts_per_token) * _staged_bytes(layers)


def divide_slots(
    num_bytes: int,
    layers: Sequence[StreamedLayer],
    experts_per_token: int,
    rates: Sequence[np.ndarray] | None = None,
) -> SlotPlan:
    """Divide the memory for experts of a rank.

    What the staging area leaves goes to the experts with the highest rates per byte, so that layers whose popular
    experts stand out get fewer places. With equal rates all layers get the same share.

    Args:
        num_bytes: memory for experts; the staging area exists even if it needs more.
        layers: layers of the rank with routed experts.
        experts_per_token: number of routed experts that a token chooses.
        rates: how often each expert is used, (num_experts,) of each layer, in any unit; None if unknown.
    """
    staged_bytes, all_bytes = _staged_bytes(layers), sum(layer.num_experts * layer.expert_bytes for layer in layers)
    staging = min_staging(layers, experts_per_token)
    if staging and num_bytes - staging * staged_bytes < all_bytes:
        most = max(layer.num_experts for layer in layers)
        staging = max(staging, min(num_bytes // (STAGING_SHARE * staged_bytes), MAX_STAGING, most))
    kept = _choose_kept(num_bytes - staging * staged_bytes, layers, rates)
    used = sum(count * layer.expert_bytes for count, layer in zip(kept, layers, strict=True))
    return SlotPlan(tuple(kept), staging, staging * staged_bytes + used)


def _staged_bytes(layers: Sequence[StreamedLayer]) -> int:
    """Return the bytes of one place in the staging areas of all formats."""
    sizes = {(layer.format, layer.expert_bytes) for layer in layers}
    return sum(size for _, size in sizes)


def _choose_kept(num_bytes: int, layers: Sequence[StreamedLayer], rates: Sequence[np.ndarray] | None) -> list[int]:
    """Return the number of experts of each layer that are among the most useful ones per byte."""
    falling = [
        np.zeros(layer.num_experts) if rates is None else np.sort(rates[index])[::-1] / layer.expert_bytes
        for index, layer in enumerate(layers)
    ]
    kept = [0] * len(layers)
    queue = [(-values[0], 0, index) for index, values in enumerate(falling) if len(values)]
    heapq.heapify(queue)
    while queue:
        _, count, index = heapq.heappop(queue)
        num_bytes -= layers[index].expert_bytes
        if num_bytes < 0:
            break
        kept[index] = count + 1
        if count + 1 < layers[index].num_experts:
            heapq.heappush(queue, (-falling[index][count + 1], count + 1, index))
    return kept
