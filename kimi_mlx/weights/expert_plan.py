"""Separate the routed experts of a layer from its other weights; layout of the record of an expert.

A record has all arrays of one routed expert of one layer that a rank holds, so that a single read loads them:

    gate_up_proj    weight, scales, biases; twice if gate and up have different quantizations
    down_proj       weight, scales, biases
    tag             TAG_BYTES at the end of the record (kimi_mlx.weights.expert_tag)

Each array is padded to IO_ALIGNMENT, the record to RECORD_ALIGNMENT, the page size of a Mac.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from kimi_mlx.model.config_quantization import Quantization
from kimi_mlx.uncached_file import IO_ALIGNMENT
from kimi_mlx.weights.expert_tag import TAG_BYTES
from kimi_mlx.weights.header import DTYPE_BYTES
from kimi_mlx.weights.plan import ArrayPlan, LayerPlan, WeightPlan

RECORD_ALIGNMENT = 1 << 14
"""Alignment in bytes of records in a file, and of their size."""

MatrixName = Literal["gate_up", "down"]

EXPERT_ENTRIES: dict[MatrixName, str] = {"gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
"""Entries of the canonical tree that hold the experts, in the order of a record."""


@dataclass(frozen=True)
class ExpertArray:
    """One array of an expert.

    Args:
        matrix: `gate_up` or `down`.
        part: number of the part; above 0 only if gate and up have different quantizations.
        field: `weight`, `scales` or `biases`.
        dtype: type as safetensors names it.
        shape: (rows, columns) of one expert on this rank, as stored.
        quantization: quantization of the matrix; None if float.
    """

    matrix: MatrixName
    part: int
    field: str
    dtype: str
    shape: tuple[int, int]
    quantization: Quantization | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ExpertsPlan:
    """The routed experts of a layer that a rank holds.

    Args:
        first_expert: number of the first one.
        num_experts: number of experts.
        arrays: arrays of one expert, in the order of a record.
        plans: plan of the stack of each array: (num_experts, rows, columns).
    """

    first_expert: int
    num_experts: int
    arrays: tuple[ExpertArray, ...]
    plans: tuple[ArrayPlan, ...]


@dataclass(frozen=True)
class RecordLayout:
    """Layout of a record.

    Args:
        offsets: first byte of each array in the record.
        record_bytes: size of a record.
    """

    offsets: tuple[int, ...]
    record_bytes: int


def split_experts(plan: LayerPlan) -> tuple[LayerPlan, ExpertsPlan | None]:
    """Separate the routed experts of a layer from its other weights.

    Returns:
        The plan of the other weights, in which stacks of experts have only the shared ones, or do not exist; and the
        routed experts, None without any.
    """
    if EXPERT_ENTRIES["down"] not in plan.entries:
        return plan, None
    entries, arrays, plans = dict(plan.entries), list[ExpertArray](), list[ArrayPlan]()
    num_experts = plan.entries[EXPERT_ENTRIES["down"]][0].arrays[0].shape[0] - plan.num_fused_shared
    for matrix, entry in EXPERT_ENTRIES.items():
        for number, part in enumerate(plan.entries[entry]):
            for array in part.arrays:
                _, rows, columns = array.shape
                arrays.append(ExpertArray(matrix, number, array.name, array.dtype, (rows, columns), part.quantization))
                plans.append(_members(array, 0, num_experts))
        if plan.num_fused_shared:
            entries[entry] = tuple(
                WeightPlan(
                    tuple(_members(array, num_experts, plan.num_fused_shared) for array in part.arrays),
                    part.quantization,
                )
                for part in plan.entries[entry]
            )
        else:
            del entries[entry]
    experts = ExpertsPlan(plan.first_expert, num_experts, tuple(arrays), tuple(plans))
    return replace(plan, entries=entries), experts


def lay_out_record(arrays: Sequence[ExpertArray]) -> RecordLayout:
    """Return the layout of a record of these arrays."""
    offsets: list[int] = []
    end = 0
    for array in arrays:
        offsets.append(end)
        end = round_up(end + array.size_bytes, IO_ALIGNMENT)
    return RecordLayout(tuple(offsets), round_up(end + TAG_BYTES, RECORD_ALIGNMENT))


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


def _members(array: ArrayPlan, first: int, count: int) -> ArrayPlan:
    """Return the plan of some members of a stack: the routed experts, or the shared ones."""
    copies = tuple(copy for copy in array.copies if first <= copy.member < first + count)
    if first:
        copies = tuple(replace(copy, member=copy.member - first) for copy in copies)
    return replace(array, shape=(count, *array.shape[1:]), copies=copies)
